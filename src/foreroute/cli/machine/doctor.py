"""`foreroute doctor`: is this machine ready, and what to do where it is not? No model is loaded."""

import argparse
from pathlib import Path
from typing import Any

from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.cli.machine.findings import OK, PROBLEM, WARNING, Finding

EXIT_PROBLEM = 1
_MARKS = {OK: "ok", WARNING: "!", PROBLEM: "X"}

_EPILOG = """\
examples:
  foreroute doctor
  foreroute doctor MODEL --json     read this model's files for the disk's speed

It reads the largest model's files for 2 s at most, past the page cache where
that can be, and looks at memory, processors, packages, ggml's kernels and CUDA.
`foreroute plan MODEL` says how fast a model would be. Exit code 1: there is a
problem, with which nothing runs; a warning is about speed or room."""


def add_parser(commands: Any) -> None:
    """Add `doctor` to the commands."""
    parser = commands.add_parser(
        "doctor",
        help="look at this machine: disk, memory, kernels, packages",
        usage="foreroute doctor [MODEL] [flags]",
        description="Look at what foreroute needs of this machine, and say what to do.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="whose files are read (default: the largest)")
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    files = _weights(args)
    with figures.busy("Looking at this machine", args.json):
        found = examine(files)
    worst = max((one.status for one in found), key=(OK, WARNING, PROBLEM).index)
    if args.json:
        figures.print_json(status=worst, findings=found)
    else:
        console = figures.stdout_console()
        for one in found:
            console.print(f"{_MARKS[one.status]:<3} {one.name:<11} {one.found}", soft_wrap=True, markup=False)
            if one.advice:
                console.print(f"{'':<15} {one.advice}", soft_wrap=True, markup=False)
    return EXIT_PROBLEM if worst == PROBLEM else 0


def _weights(args: argparse.Namespace) -> list[Path]:
    """The weight files that may be read: of MODEL, or of all models that have a name."""
    if args.model is not None:
        target = options.alias_target(args, args.model)
        return _files_of(locate(target, quiet=True, access=HubAccess(local_files_only=True)))
    from foreroute.cli.models.cached import aliased_models, named_models

    models = [*aliased_models(args.aliases), *named_models()]
    return [file for one in models if one.is_whole for file in _files_of(one.path)]


def _files_of(model: Path) -> list[Path]:
    return [model] if model.is_file() else list(model.glob("*.safetensors"))


def examine(files: list[Path]) -> list[Finding]:
    """Look at everything, the disk by one of `files`."""
    from foreroute.cli.machine import disk, host, software

    return [
        *software.package_findings(),
        *disk.disk_findings(files),
        disk.free_finding(HubAccess().cache),
        host.memory_finding(),
        host.processor_finding(),
        host.pages_finding(),
        software.ggml_finding(),
        software.cuda_finding(),
        *software.extra_findings(),
    ]
