"""Regenerate the held-out text and glossary that `foreroute eval --suite builtin` reads.

    python models/held_out.py            # also: make held-out

Fetches the Debian packages that the models' text comes from (through apt; nothing is installed), splits them as
training did, and keeps the held-out part where the command looks for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python models/held_out.py` finds the package

from foreroute.cli.commands.evaluate import default_held_out
from models import data


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/models"), help="data (150 MB)")
    parser.add_argument("--out", type=Path, default=default_held_out(), help="the file (default: %(default)s)")
    options = parser.parse_args()
    data.prepare(options.work)
    data.held_out(options.work).write(options.out)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
