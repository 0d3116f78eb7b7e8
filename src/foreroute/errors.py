"""Every error that foreroute raises on purpose.

A message names what is wrong and what to do about it. Our own bugs are assertions, never these. What parsers of other
people raise on a damaged file is turned into one of these where they are called (`named`).
"""

import contextlib
import traceback
from collections.abc import Iterator


class ForerouteError(Exception):
    """Base of every error raised on purpose; `except ForerouteError` catches them all."""


class CheckpointError(ForerouteError):
    """The checkpoint cannot be run as it is."""


class UnsupportedModelError(CheckpointError):
    """A valid model, but not one that foreroute can run; the message says why."""


class CorruptCheckpointError(CheckpointError):
    """Bytes of the checkpoint are missing, overlap, or have the wrong dtype or shape."""


class StoreError(ForerouteError):
    """A packed store cannot be used with this model, or cannot be written."""


class ChecksumError(StoreError):
    """A packed record's bytes differ from those that were packed; the message names the expert."""


class PredictorError(ForerouteError):
    """A file of fitted predictors is damaged or belongs to another model, or a text does not do for fitting one."""


class PolicyError(ForerouteError):
    """A policy is not known, or cannot be had with this model; the message says what it lacks."""


class EvaluationError(ForerouteError):
    """An evaluation cannot be run; the message says what is missing."""


class BudgetError(ForerouteError):
    """The memory budget cannot work; the message says which one would."""


class DeviceError(ForerouteError):
    """A device, its driver or its memory cannot do what was asked; the message says what would work."""


class ReadError(ForerouteError):
    """Reading weights failed; the message names the file, and of an expert which one and where."""


class ChangedFileError(ReadError):
    """A file of weights was replaced, written to or cut off since its header was read; only loading again helps."""


class TraceError(ForerouteError):
    """A trace cannot be written, or the file is not a trace that a report can be made of."""


class PromptError(ForerouteError):
    """The prompt cannot be run."""


class ServerError(ForerouteError):
    """The server cannot be started like this; the message says what to change."""


class QueueFullError(ForerouteError):
    """The queue of requests is full."""


class ContextLengthError(ForerouteError):
    """Prompt and answer do not fit the context; the message names both numbers."""


class GrammarError(ForerouteError):
    """A JSON schema, regex or grammar cannot be enforced; the message names what of it."""


class RefusedError(ForerouteError, RuntimeError):
    """The operation is not defined for a model whose experts are offloaded."""


# What Python code raises on values that make no sense. MemoryError is among them: a size may ask for all memory.
_RAISED = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError,
    NameError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
# Raised as plain Exception (tokenizers), or derived from it (jinja2, safetensors, huggingface_hub), or, where Rust code
# gave up, from BaseException.
_RAISED_BY_NAME = frozenset({"Exception", "TemplateError", "SafetensorError", "StrictDataclassError", "PanicException"})
_MOST_CHARS = 300


@contextlib.contextmanager
def named(what: str, error: type[ForerouteError] = CorruptCheckpointError, advice: str = "") -> Iterator[None]:
    """While inside, an error of a library's parser is raised as `error`: "{what}: its reason. {advice}".

    Our own errors and Ctrl-C pass.
    """
    try:
        yield
    except ForerouteError:
        raise
    except BaseException as failure:
        if not isinstance(failure, _RAISED) and _RAISED_BY_NAME.isdisjoint(_names(failure)):
            raise
        if isinstance(failure, AssertionError | NameError) and _is_our_bug(failure):
            raise
        reason = reason_of(failure)
        raise error(f"{what}: {reason}{'' if reason.endswith('...') else '.'} {advice}".rstrip()) from failure


def _is_our_bug(failure: BaseException) -> bool:
    """Whether it was raised by a line of this package, and so is no parser's word on a file."""
    frames = traceback.walk_tb(failure.__traceback__)
    return str([frame for frame, _ in frames][-1].f_globals.get("__name__")).startswith("foreroute.")


def reason_of(failure: BaseException) -> str:
    """What an exception says, in one line, without its full stop; its class where that alone says something."""
    text = " ".join(str(failure).split())
    if isinstance(failure, RecursionError):
        text = "it is nested too deep"
    if isinstance(failure, KeyError):
        text = f"{text} is missing"
    if len(text) > _MOST_CHARS:
        return text[:_MOST_CHARS].rstrip(" .") + " ..."
    return text.rstrip(".") or type(failure).__name__


def _names(failure: BaseException) -> list[str]:
    """Of the class and what it derives from; plain Exception counts only where it is the class itself."""
    cls = type(failure)
    return [cls.__name__] + [base.__name__ for base in cls.__mro__[1:] if base is not Exception]
