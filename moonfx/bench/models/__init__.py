"""`moonfx bench model`, `compile`, `passes` and `perplexity`: whole models."""
