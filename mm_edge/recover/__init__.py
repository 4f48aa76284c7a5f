"""Bringing accuracy back after pruning: one verb per file."""
