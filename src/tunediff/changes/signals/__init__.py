"""Signals: evidence without training, read off both models' predictions in one pass; one file a signal."""
