"""What the kernels share: a call's arguments, sequence positions, token-major storage."""
