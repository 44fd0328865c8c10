"""Families: where a network keeps its blocks, its streams and its unembedding; one file a way of keeping them."""
