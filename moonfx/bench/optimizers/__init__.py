"""`moonfx bench optimizer` and `newton-schulz`."""
