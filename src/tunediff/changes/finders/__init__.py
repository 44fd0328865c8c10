"""Finders: each file holds one finder, which proposes changes from a harvest's training split."""
