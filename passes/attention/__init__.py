"""Finds dense softmax attention, however it is spelled, and writes MoBA's operator in its place."""
