"""Flags of the engine, made from the fields of EngineConfig, and flags that several commands share."""

import argparse
import math
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from foreroute.checkpoint.locate import locate
from foreroute.config import EngineConfig
from foreroute.errors import PromptError
from foreroute.whole_files import beside, read_bytes

# Fields of EngineConfig for experts on a GPU, or for a server; commands whose inputs stay on the CPU omit them.
GPU_FIELDS = ("device", "control", "host_memory", "kv_tokens", "prefix_cache", "prefix_cache_dir")
# Fields whose flags every --help shows.
_COMMON_FIELDS = ("memory", "packed", "device", "host_memory")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Characters of choices that are shown behind a flag, within 80 columns.
_WIDEST_CHOICES = 60
# Title of the group that --help leaves to --help-all, where there is one.
_SETTINGS = "settings"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_engine_options(
    parser: argparse.ArgumentParser, without: Sequence[str] = (), shown: Sequence[str] = (), **defaults: Any
) -> None:
    """Add a flag to `parser` for every field of EngineConfig, with its help, choices and default; see `engine_config`.

    Flags that few need, and those that switch off one part to measure its gain, are shown by --help-all and not by
    --help.

    Args:
        without: fields for which the command has its own flags.
        shown: fields whose flags --help shows here, though few need them elsewhere.
        defaults: other defaults for some fields, by name.
    """
    group = parser.add_argument_group("engine")
    more = parser.add_argument_group("more of the engine")
    ablations = parser.add_argument_group(
        "ablation switches", "each fixes or switches off one part, to measure what that part is worth"
    )
    parser.add_argument("--help-all", action=_HelpAll, help="show all flags and the figures, and exit")
    hints = get_type_hints(EngineConfig)
    for field in fields(EngineConfig):
        if field.name in without:
            continue
        default = defaults.get(field.name, field.default)
        kind = _scalar(hints[field.name])
        settings: dict[str, Any] = {"default": default, "help": field.metadata["help"] + _shown(default)}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif field.metadata["choices"]:
            settings["choices"] = field.metadata["choices"]
            if len(",".join(settings["choices"])) > _WIDEST_CHOICES:  # the help text lists them
                settings["metavar"] = "TYPE"
        else:
            settings.update(type=kind, metavar="N" if kind is int else field.name.upper())
        is_common = field.name in _COMMON_FIELDS or field.name in shown
        place = ablations if field.metadata["is_ablation"] else group if is_common else more
        place.add_argument(_flag(field.name), **settings)
    group.add_argument("--learn", "--no-learn", action=_Removed, help="the online learner was removed")
    for hidden in (more, ablations, *(one for one in parser._action_groups if one.title == _SETTINGS)):
        _HelpAll.hide(hidden)


def shorten_help(parser: argparse.ArgumentParser) -> None:
    """Leave what the epilog of `parser` says after its examples to --help-all; call it after `add_engine_options`."""
    _HelpAll.hide_figures(parser)


def engine_config(args: argparse.Namespace, without: Sequence[str] = ()) -> EngineConfig:
    """Build the EngineConfig from the flags of `add_engine_options`; fields without a flag keep their defaults.

    Args:
        args: parsed flags. without: fields whose flag is the command's own and means something else.
    """
    given = {name: value for name, value in vars(args).items() if name not in without}
    if isinstance(given.get("draft"), str):
        given["draft"] = alias_target(args, given["draft"])
    return EngineConfig(**{field.name: given[field.name] for field in fields(EngineConfig) if field.name in given})


MODEL_HELP = (
    "folder of a checkpoint, a .gguf file, a name that `foreroute list` shows, or a hub id: org/name, or "
    "org/name:Q4_K_M of GGUF files"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and --revision, which `find_model` reads."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: main)")


def find_model(args: argparse.Namespace) -> Path:
    """Return the local folder or file of MODEL; download a hub id first, with bars unless output is for programs.

    Raises:
        CheckpointError: there is no such model, or it cannot be downloaded.
    """
    model = alias_target(args, args.model)
    return locate(model, revision=args.revision, quiet=args.json or getattr(args, "quiet", False))


def alias_target(args: argparse.Namespace, model: str) -> str:
    """What `model` stands for in the config file's [aliases]; itself where it is none, or a path here."""
    aliases: dict[str, str] = getattr(args, "aliases", {})
    return aliases[model] if model in aliases and not Path(model).expanduser().exists() else model


def place_beside(model: Path, name: str, out: Path | None) -> Path:
    """Choose the path of a model's file: `out` (a file or folder), or where `name` is found without being asked for."""
    if out is None:
        return beside(model, name)
    path = out.expanduser()
    return path / name if path.is_dir() else path


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Add --dtype, with the default `dtype`, and --threads to `parser`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dtype", choices=_DTYPES, default=dtype, help=f"compute dtype; auto is the stored one (default: {dtype})"
    )
    group.add_argument("--threads", type=at_least(1), metavar="N", help="torch threads (default: one per usable core)")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, for programs")
    add_debug_options(parser)


def add_debug_options(parser: argparse.ArgumentParser) -> None:
    """Add --debug and --print-config, of commands that print no JSON too."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")
    parser.add_argument_group(_SETTINGS).add_argument(
        "--print-config", action="store_true", help="show each flag's value and where it is set, and exit"
    )


def at_least(least: int) -> Callable[[str], int]:
    """Make an argparse type: an int of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def between(low: float, high: float = math.inf, *, open_below: bool = False) -> Callable[[str], float]:
    """Make an argparse type: a float in [low, high], or in (low, high] when open_below."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or (open_below and value == low):
            span = (f"above {low:g}" if open_below else f"at least {low:g}") + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} must be {span}")
        return value

    return number


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Read the prompt from the command line, a file, or standard input ("-", or none given and input piped).

    One newline at the end of a file or of standard input is dropped: editors and `echo` add it.

    Raises:
        PromptError: there is no prompt, or two, or it is not UTF-8 text.
    """
    if prompt is not None and file is not None:
        raise PromptError("There is a PROMPT and a --file. Give one of them.")
    if file is not None:
        return _as_text(read_bytes(file.expanduser(), PromptError), str(file))
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return _as_text(sys.stdin.buffer.read(), "Standard input")
    if prompt is None:
        raise PromptError('There is no prompt. Write it after the model, give --file, or pipe it in ("-").')
    return argument_text(prompt, "The prompt")


def argument_text(text: str, name: str) -> str:
    """Decode `text`, an argument that the locale could not read: surrogates stand for its bytes, read as UTF-8.

    Args:
        name: of the argument, for the message.
    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeError as error:
            at = getattr(error, "start", 0)
            raise PromptError(f"{name} is not UTF-8 text (byte {at}).") from None
    return text


def _as_text(raw: bytes, source: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text (byte {error.start}).") from None
    if not text.strip():
        raise PromptError(f"{source} is empty: there is no prompt in it.")
    return text.removesuffix("\n").removesuffix("\r")


def quiet_libraries(args: argparse.Namespace) -> None:
    """Silence the warnings and bars of libraries, unless --debug. Call it before importing transformers."""
    if args.debug:
        return
    import warnings

    # Environment variables, as transformers reads them on import; the user's values stay.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")


def apply_threads(args: argparse.Namespace) -> None:
    """Set torch's threads to --threads; by default at most the number of processors that this process may use.

    torch counts those of the machine, and a container may have fewer: extra threads block each other.
    OMP_NUM_THREADS or MKL_NUM_THREADS win over the default.
    """
    import torch

    from foreroute.memory.host import usable_cpus

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


class _Removed(argparse.Action):
    """A flag of older versions: it changes nothing, and says on stderr why (its help, which --help leaves out)."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self._why = help

    def __call__(self, parser: argparse.ArgumentParser, args: object, values: object, flag: str | None = None) -> None:
        print(f"Note: {flag} does nothing: {self._why}.", file=sys.stderr)


class _HelpAll(argparse.Action):
    """--help-all: show the help with the hidden groups."""

    _HIDDEN, _FIGURES = "hidden_help", "whole_epilog"

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    @classmethod
    def hide_figures(cls, parser: argparse.ArgumentParser) -> None:
        """Leave what the epilog says after its examples out of --help."""
        whole = str(parser.epilog)
        setattr(parser, cls._FIGURES, whole)
        parser.epilog = whole.partition("\n\n")[0] + "\n\n--help-all lists every flag, and says what the figures mean."

    @classmethod
    def hide(cls, group: argparse._ArgumentGroup) -> None:
        """Leave the group's flags out of --help; they are still parsed."""
        for action in group._group_actions:
            setattr(action, cls._HIDDEN, action.help)
            action.help = argparse.SUPPRESS
        setattr(group, cls._HIDDEN, (group.title, group.description))
        group.title = group.description = None

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for group in parser._action_groups:
            if hasattr(group, self._HIDDEN):
                group.title, group.description = getattr(group, self._HIDDEN)
        for action in parser._actions:
            action.help = getattr(action, self._HIDDEN, action.help)
        parser.epilog = getattr(parser, self._FIGURES, parser.epilog)
        parser.print_help()
        parser.exit()


def _shown(default: Any) -> str:
    if default is None:
        return ""
    text = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default).replace("%", "%%")
    return f" (default: {text})"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _scalar(hint: Any) -> type:
    """The type for a flag's text: bool, int or str; str where a field takes both."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not type(None)]
    if str in kinds:
        return str
    (kind,) = kinds
    assert kind in (bool, int), f"EngineConfig has a field of type {hint}, for which there is no flag yet"
    return kind
