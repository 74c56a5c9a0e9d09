"""Reads a tensor of the graph as a sympy function of its indices."""
