"""Harvests: what both models compute on the same text."""
