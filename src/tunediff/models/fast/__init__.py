"""Faster runs of other people's networks, applied on entering a run and taken back on leaving it."""
