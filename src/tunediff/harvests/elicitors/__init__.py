"""Elicitors: ways to search for questions on which both models' answers differ, a file each."""
