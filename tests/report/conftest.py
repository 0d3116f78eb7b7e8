"""`run`: the command line in this process."""

from tests.cli.conftest import run, same_threads_afterwards

__all__ = ["run", "same_threads_afterwards"]
