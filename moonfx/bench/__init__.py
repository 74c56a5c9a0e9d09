"""The benchmarks of `moonfx bench`."""
