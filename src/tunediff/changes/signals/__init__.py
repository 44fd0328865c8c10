"""Signals: tables of evidence from both models' predictions in one pass, without training; one file a signal."""
