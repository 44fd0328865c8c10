"""Finders: each proposes changes from a harvest's training part; one file a finder."""
