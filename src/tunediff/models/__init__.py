"""Models: networks that are loaded, read, written to and compared."""
