"""The command line in this process, and the tiny model, as in tests/cli."""

from tests.cli.conftest import run as run
from tests.cli.conftest import same_threads_afterwards as same_threads_afterwards
from tests.cli.conftest import tiny as tiny
