"""The transformers model whose experts belong to the engine: what it still does, and what it refuses."""

import functools
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import Plan
from foreroute.engine.interfaces import EngineStats, MoeEngine, StepInfo
from foreroute.engine.moe_step import MoeStep
from foreroute.errors import RefusedError
from foreroute.loading.step_entry import StepEntry, entered
from foreroute.model.blocks import MoeLayer
from foreroute.model.draft_model import DraftModel
from foreroute.model.experts import CLOSED, ExpertsForward
from foreroute.model.text import load_tokenizer
from foreroute.policy import Policy
from foreroute.predict.governor import Governor

_Self = TypeVar("_Self", bound="OffloadedModel")


class ForerouteHandle:
    """`model.foreroute`: the plan, the counts, the policies, the tokenizer, and `close`; in a `with` block it closes.

    Attributes:
        plan: what `load` decided.
        engine: computes the experts; internal.
        layers: the MoE layers that the probe found. table: their experts, by key.
        entry: the model's lock; begins its steps.
        decoder: of answers, if the device pages experts (generation/graph_decoder.py); made with the first answer.
        draft: what drafts tokens (a `DraftModel`, or PROMPT_LOOKUP), as EngineConfig.draft asked; None: nothing.
        drafts: each drafter that was used, with its governor, by what it was made of (drafting/draft.py).
    """

    def __init__(
        self, plan: Plan, engine: MoeEngine, layers: list[MoeLayer], table: ExpertTable, entry: StepEntry
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.layers = layers
        self.table = table
        self.entry = entry
        self.draft: DraftModel | str | None = None
        # Of folders above this one.
        self.decoder: Any = None
        self.drafts: dict[Any, Any] = {}

    def step(self, info: StepInfo) -> AbstractContextManager[None]:
        """Within the context, declare the step of this thread's next model call; else it is guessed from the shape.

        with model.foreroute.step(StepInfo("prefill", 1, ids.shape[1], ids)):
            logits = model(ids, past_key_values=cache).logits
        """
        return self.entry.announced(info)

    @property
    def host_engine(self) -> MoeStep:
        """The engine as a `MoeStep`, which has a pool, a prefetcher and listeners.

        Raises:
            RefusedError: the device pages for itself.
        """
        if not isinstance(self.engine, MoeStep):
            raise RefusedError(
                'This needs the pool of experts on the host, which control="device" does not have. Load the model with '
                'EngineConfig(control="host").'
            )
        return self.engine

    @property
    def lock(self) -> Any:
        """The model's lock, re-entrant: `with model.foreroute.lock:` keeps other threads waiting for several calls.

        Raises:
            RefusedError: this process was forked from the one that loaded the model.
        """
        return self.entry.lock

    @contextmanager
    def computing(self, wrapped: Callable[[int, ExpertsForward], ExpertsForward]) -> Iterator[None]:
        """While inside, MoE layers compute their experts by `wrapped(layer, compute)`; `compute` is the layer's own.

        Raises:
            RefusedError: the model is closed.
        """
        modules = [layer.experts for layer in self.layers]
        own = [module.engine_forward for module in modules]
        try:
            for layer, (module, compute) in enumerate(zip(modules, own, strict=True)):
                if compute is None:
                    raise RefusedError(CLOSED)
                module.engine_forward = wrapped(layer, compute)
            yield
        finally:
            for module, compute in zip(modules, own, strict=True):
                module.engine_forward = compute

    def stats(self) -> EngineStats:
        """Return a copy of all counts since the model was loaded; `.minus(earlier)` gives those since then.

        Does not wait: while another thread generates, the counts are the current ones.
        """
        return self.engine.snapshot()

    @property
    def governor(self) -> Governor | None:
        """The governor of prefetch; None if it is off (see EngineConfig.governor)."""
        return self.engine.governor

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The current policies: one for every row, or one per row."""
        return self.engine.policies.policies

    @property
    def is_exact(self) -> bool:
        """Whether no current policy changes what is computed."""
        return all(policy.is_exact for policy in self.policies)

    def set_policy(self, *policies: str | Policy) -> None:
        """Decode under these policies from the next step on: one for every row, or one per row of the batch.

        Prompts are always exact. Waits while another thread generates.

        Raises:
            PolicyError: not known, or not supported by this model; nothing has been changed.
        """
        with self.lock:
            self.engine.policies.set([Policy.parse(one) if isinstance(one, str) else one for one in policies])

    def check_policy(self, policy: Policy) -> None:
        """Check that this model supports the policy.

        Raises:
            PolicyError: it does not; the message says why.
        """
        self.engine.policies.check(policy)

    def tokenizer(self) -> Any:
        """Load transformers' tokenizer of this model, also of a GGUF file.

        Raises:
            CheckpointError: it has none, or one that cannot be read.
        """
        return load_tokenizer(self.plan.folder)

    def __enter__(self) -> "ForerouteHandle":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and free the pool. The model's experts cannot be computed afterwards.

        Waits while another thread generates. Does nothing in a process that was forked from the one that loaded the
        model.
        """
        if self.entry.is_forked:
            return
        with self.lock:
            self.entry.close()
            for layer in self.layers:
                layer.experts.engine_forward = None
            self.decoder, self.draft = None, None
            self.drafts.clear()
            self.engine.close()


def _refuse(what: str, why: str) -> Any:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise RefusedError(f"{what} is not possible on a model with offloaded experts: {why}")

    refused.__name__ = what
    return refused


_NOT_ALL_HERE = "the expert weights are not in it. Use the original checkpoint, or load it with transformers."
_AS_LOADED = "experts are kept as stored. Choose the dtype when loading: foreroute.load(..., dtype=...)."


class OffloadedModel:
    """A model of `load`: a mixin in front of transformers' class, for what would otherwise be silently wrong."""

    foreroute: ForerouteHandle

    # Not at runtime, where transformers reads annotations of `config`: what this package uses of a model; other
    # attributes are the family's.
    if TYPE_CHECKING:
        config: Any
        generation_config: Any
        device: torch.device
        dtype: torch.dtype

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def __getattr__(self, name: str) -> Any: ...

    save_pretrained = _refuse("save_pretrained", _NOT_ALL_HERE)
    push_to_hub = _refuse("push_to_hub", _NOT_ALL_HERE)
    compile = _refuse("compile", "its experts are loaded and evicted between kernels.")
    half = _refuse("half", _AS_LOADED)
    float = _refuse("float", _AS_LOADED)
    double = _refuse("double", _AS_LOADED)
    bfloat16 = _refuse("bfloat16", _AS_LOADED)
    cuda = _refuse("cuda", "it stays where it was loaded. Choose when loading: foreroute.load(..., device=...).")
    # All other ways to move or convert a module end here: type, to_empty, share_memory, ...
    _apply = _refuse("moving or converting", _AS_LOADED)
    __deepcopy__ = _refuse("deepcopy", "two models cannot share one pool. Load it again.")
    __reduce_ex__ = _refuse("pickling", "its experts are on disk. Load it again where it is needed.")

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.foreroute.close()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Accepted when nothing changes (the device and dtype it has); refused otherwise."""
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = parsed[:2]
        if device is not None and device.type != self.device.type:
            raise RefusedError(f"The model was loaded for {self.device}; its experts cannot follow it to {device}.")
        if dtype is not None and dtype != self.dtype:
            raise RefusedError(f"The model computes in {self.dtype}; {_AS_LOADED}")
        return self

    def cpu(self) -> Any:
        """Return the model, which is on the CPU already."""
        return self.to("cpu")

    def train(self, mode: bool = True) -> Any:
        """Refuse training mode: by the time of a backward pass, an expert's slot holds another expert."""
        if mode:
            raise RefusedError("A model with offloaded experts cannot be trained. Train it with transformers itself.")
        own: Any = super()
        return own.train(False)


def handle_of(model: object) -> ForerouteHandle:
    """Return the handle of a caller's `model`, which may be any object; an `OffloadedModel` has it as `foreroute`.

    Raises:
        RefusedError: it was not loaded by `load`.
    """
    handle: ForerouteHandle | None = getattr(model, "foreroute", None)
    if handle is None:
        raise RefusedError(
            f"This {type(model).__name__} was not loaded by foreroute.load, so that it has no engine for its experts. "
            "Load it with foreroute.load(path, memory=...)."
        )
    return handle


def make_offloaded(model: PreTrainedModel, handle: ForerouteHandle) -> OffloadedModel:
    """Turn the model, in place, into an `OffloadedModel` of the same class name, with `foreroute` attached.

    Inner models that hold its MoE layers are turned too, as users call them directly.
    """
    inside = [
        module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(_is_within(layer.name, name) for layer in handle.layers)
    ]
    for module in inside:
        cls = type(module)
        # The same name and module: transformers' pipelines and lm-eval tell models by their class name. Gradients are
        # left out by `entered`, not by freezing parameters: torch's matmul reads their requires_grad, and gives other
        # bits.
        own: dict[str, Any] = {"__module__": cls.__module__, "forward": entered(cls.forward)}
        if module is model:
            own["num_parameters"] = _num_parameters
        if hasattr(cls, "generate"):
            own["generate"] = _one_at_a_time(cls.generate)
        module.__class__ = type(cls.__name__, (OffloadedModel, cls), own)
        object.__setattr__(module, "foreroute", handle)
    weakref.finalize(handle, _close_unless_forked, handle.engine, os.getpid())
    return cast(OffloadedModel, model)


def _num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Numbers in all weights, as transformers counts them for the resident model: experts too, and what is in blocks.

    Args:
        only_trainable: none is, as a model with offloaded experts cannot be trained. exclude_embeddings: count none of
            embedding tables.
    """
    plan = self.foreroute.plan
    return 0 if only_trainable else plan.num_parameters - exclude_embeddings * plan.num_embeddings


def _is_within(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _one_at_a_time(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Run transformers' generate() under the model's lock, and under that of an assistant."""

    @functools.wraps(generate)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self.foreroute
        other = getattr(kwargs.get("assistant_model"), "foreroute", handle)
        # Always in one order: two models may be each other's assistants, in two threads.
        first, second = sorted((handle.entry, other.entry), key=id)
        with first.lock, second.lock:
            return generate(self, *args, **kwargs)

    return waiting


def _close_unless_forked(engine: MoeEngine, process: int) -> None:
    if os.getpid() == process:
        engine.close()
