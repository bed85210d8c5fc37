"""Weights by our names wherever they lie, and from one format into another."""
