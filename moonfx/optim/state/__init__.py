"""Optimizer state: read an AdamW's, hand it over, load and store it."""
