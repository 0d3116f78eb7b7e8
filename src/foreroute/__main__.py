"""`python -m foreroute`: the command `foreroute`."""

import sys

from foreroute.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
