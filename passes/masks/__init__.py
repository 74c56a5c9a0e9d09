"""Proves, for every shape, what a mask is: causal, padding, packed, a key bias - or why not."""
