"""The definitions, in plain PyTorch: the oracle of every test, never on a hot path."""
