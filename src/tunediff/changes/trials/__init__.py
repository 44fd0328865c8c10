"""Trials: each file holds one trial, which intervenes on a change and measures the effect."""
