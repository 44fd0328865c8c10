"""Runs: a plan, carried out stage by stage."""
