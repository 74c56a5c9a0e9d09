"""Timing, memory and argument types that all benchmarks share."""
