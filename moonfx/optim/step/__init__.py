"""One step: momentum, Newton-Schulz, write-back; eager, compiled, sharded."""
