"""`moonfx bench model`, `compile` and `passes`."""
