"""Every error that foreroute raises on purpose, and what each one means.

    ForerouteError
    ├── CheckpointError          the folder cannot be run as it is
    │   ├── UnsupportedModelError    it is a model, but not one of ours (dense, off the seam, pickled)
    │   └── CorruptCheckpointError   bytes are missing, overlap, or have the wrong dtype or shape
    ├── StoreError               a packed store cannot be used or written
    │   └── ChecksumError            a record's bytes are not the bytes that were packed
    ├── EvaluationError          an evaluation cannot be run (no held-out text, unknown task)
    ├── PredictorError           fitted predictors cannot be used with this model, made or written
    ├── BudgetError              the memory asked for cannot work; says what would
    ├── DeviceError              the GPU, its driver or pinned memory cannot do what was asked; says what would
    ├── ReadError                a file of weights could not be read
    │   └── ChangedFileError         it is not what it was when the model was loaded
    ├── TraceError               a trace cannot be written, or read for a report
    ├── PromptError              the prompt cannot be run (empty, longer than the context)
    ├── ServerError              the server cannot be started like this (address, keys)
    ├── QueueFullError           so many requests wait already that another one is not taken
    ├── ContextLengthError       prompt and answer do not fit the context
    └── RefusedError             an operation that an offloaded model cannot do

A message names what is wrong and what to do about it. Our own bugs are assertions, never these.
"""


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
    """A trace cannot be written, or the file is no trace that a report can be made of."""


class PromptError(ForerouteError):
    """The prompt cannot be run."""


class ServerError(ForerouteError):
    """The server cannot be started like this; the message says what to change."""


class QueueFullError(ForerouteError):
    """So many requests wait already that another one is not taken."""


class ContextLengthError(ForerouteError):
    """Prompt and answer do not fit the context; the message names both numbers."""


class RefusedError(ForerouteError, RuntimeError):
    """The operation is not defined for a model whose experts are offloaded."""
