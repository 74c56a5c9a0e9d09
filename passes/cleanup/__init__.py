"""Passes that tidy up after a rewrite, and the checker of a graph's invariants."""
