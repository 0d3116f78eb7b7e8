"""A program: open ggml's libraries in a folder, and compare what they compute in every type with the gguf package.

library.py runs it before it opens libraries that are not the pinned package's: should they end the process, it is this
one. Exit code 0: they can be used. REFUSED: the reason is on standard error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from foreroute.kernels.ggml.known_answers import check_types
from foreroute.kernels.ggml.library import REFUSED, GgmlError, Library


def main(arguments: Sequence[str]) -> int:
    """Try out the libraries in the folder `arguments`[0]."""
    try:
        library = Library(Path(arguments[0]))
        check_types(library, sorted(library.types.keys() - {"I32"}))
    except GgmlError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
