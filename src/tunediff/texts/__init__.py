"""Texts: documents, corpora, and rows of token ids."""
