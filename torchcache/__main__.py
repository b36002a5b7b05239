"""``python -m torchcache``: the command line."""

import sys

from torchcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
