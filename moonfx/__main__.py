"""`python -m moonfx` is the `moonfx` command."""

import sys

from moonfx.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
