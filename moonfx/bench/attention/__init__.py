"""`moonfx bench attention`."""
