"""The Dynamo backend "moonfx", as torch.compile finds it by name."""

from moonfx.backend.entry import compile

__all__ = ["compile"]
