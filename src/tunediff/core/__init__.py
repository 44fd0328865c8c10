"""Core: what knows neither networks nor text."""
