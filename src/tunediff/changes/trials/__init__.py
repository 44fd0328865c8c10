"""Trials: intervene on one change and see what follows; one file a trial."""
