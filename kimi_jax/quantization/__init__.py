"""Formats of few bits for weights: how a weight is rounded, packed, and trained nevertheless."""
