"""The benchmarks behind `moonfx bench`."""
