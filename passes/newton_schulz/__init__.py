"""Finds Newton-Schulz iterations in optimizer graphs and batches them into one operator."""
