"""Architectures: one file for each kind of dictionary."""
