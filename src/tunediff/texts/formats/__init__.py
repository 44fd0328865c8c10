"""Formats of files that hold text, one file each; its suffixes are its registration."""
