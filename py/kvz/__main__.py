"""``python -m kvz`` is the command ``kvz``."""

import sys

from kvz.cli import main

if __name__ == "__main__":
    sys.exit(main())
