"""Edits: a model with other weights, what that does and costs, and how it is written to disk."""
