"""Enter a model: one thread at a time, and its outermost forward pass begins the engine's step.

Users call a model in many ways: `model(...)`, `model.forward(...)` (wrappers such as PEFT's do), the decoder stack
inside it alone (`model.model(...)`, for embeddings), or one of its layers. In each case the outermost call begins a
step, and one without known tokens is taken for a prompt, which every policy computes exactly.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from foreroute.engine.interfaces import MoeEngine, Phase, StepInfo
from foreroute.errors import PromptError, RefusedError
from foreroute.model import torch_modes
from foreroute.model.caches import given_cache
from foreroute.model.experts import CLOSED, refuse_compiled
from foreroute.system.limits import after_fork

T = TypeVar("T")

_FORKED = (
    "This process was forked from the one that loaded the model, and has no threads that read its experts. Load the "
    "model in this process, or start it in another way than by a fork (multiprocessing: 'spawn')."
)
_NO_THREAD = 0


@dataclass(frozen=True)
class Bounds:
    """Limits of a model's prompts.

    context: most positions. vocabulary: number of tokens. None: not known.
    """

    context: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Bounds":
        """Read the limits of a transformers model."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return cls(context, getattr(model.get_input_embeddings(), "num_embeddings", None))

    def check(self, tokens: torch.Tensor, cache: Any) -> None:
        """Check that a prompt can be computed. Decoded tokens are not checked: callers may go past the context.

        Args:
            tokens: ids [rows, positions], or embeddings [rows, positions, hidden]. cache: of the tokens before.
        Raises:
            PromptError: it cannot; the message says why.
        """
        if 0 in tokens.shape[:2]:
            raise PromptError("The prompt is empty: there is no token to start from.")
        num_positions = tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if self.context is not None and num_positions > self.context:
            raise PromptError(
                f"The prompt has {num_positions} tokens, the model's context {self.context} (max_position_embeddings "
                "in config.json). Shorten the prompt."
            )
        if self.vocabulary is None or tokens.is_floating_point():
            return
        # Else the embedding raises an IndexError, or the GPU fails until the process ends.
        least, most = (int(bound) for bound in tokens.aminmax())
        if least < 0 or most >= self.vocabulary:
            raise PromptError(
                f"The prompt has the token {least if least < 0 else most}; the model has 0 to {self.vocabulary - 1}. "
                "The tokenizer (tokenizer.json) and the weights are of different models."
            )


class StepEntry:
    """A model's lock; begins the engine's steps.

    The lock is re-entrant, and taken by `with` only: Ctrl-C then cannot come between taking it and the block.

    Args:
        engine: computes the experts; not kept alive by this. num_layers: MoE layers.
        bounds: of prompts. device: where the model computes.
        decode_threads: torch's threads while a token is decoded; None leaves them.
    """

    def __init__(
        self,
        engine: MoeEngine,
        num_layers: int,
        bounds: Bounds,
        device: torch.device,
        decode_threads: int | None = None,
    ) -> None:
        # The engine lives as long as the model: after that the reference gives None.
        self._engine: Callable[[], Any] = weakref.ref(engine)
        self._num_layers = num_layers
        self._bounds = bounds
        self._device = device
        self._decode_threads = decode_threads
        self._lock = threading.RLock()
        self._is_forked = self._is_closed = False
        # The thread (it holds the lock) whose forward pass has begun a step.
        self._inside = _NO_THREAD
        # Whether, when that step began, no mode of torch was on that changes kept tensors.
        self._is_ordinary = True
        # By thread, the declared step of its next call.
        self._announced: dict[int, StepInfo] = {}
        # The last MoE layer that was called outside of any forward pass; `num_layers`: a step has begun since.
        self._lone_layer = num_layers
        _ENTRIES.add(self)

    @property
    def lock(self) -> Any:
        """Held by the thread that uses the model, for a whole answer or a forward pass: others wait.

        Raises:
            RefusedError: this process was forked from the one that loaded the model.
        """
        if self._is_forked:
            raise RefusedError(_FORKED)
        return self._lock

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that loaded the model."""
        return self._is_forked

    def close(self) -> None:
        """Refuse to begin any further step."""
        self._is_closed = True

    def forked(self) -> None:
        """Note that this process has been forked: the lock's holder and the readers do not exist in it."""
        self._is_forked, self._inside = True, _NO_THREAD

    def forward(
        self, forward: Callable[..., T], names: tuple[str, ...], module: nn.Module, args: Any, kwargs: Any
    ) -> T:
        """Call the module's own `forward`; the outermost call begins a step first.

        Args:
            names: of its parameters, in order.
        Raises:
            RefusedError: compiled, under autocast, closed, or in a forked process.
            PromptError: the prompt is empty, or longer than the context.
        """
        with self.lock:
            if self._inside:
                return forward(module, *args, **kwargs)
            self._check()
            threads = None if self._decode_threads is None else torch.get_num_threads()
            try:
                self._inside = self._begin({**dict(zip(names, args, strict=False)), **kwargs})
                with torch.no_grad():
                    return forward(module, *args, **kwargs)
            finally:
                self._inside = _NO_THREAD
                if threads is not None:
                    torch.set_num_threads(threads)

    @contextmanager
    def announced(self, info: StepInfo) -> Iterator[None]:
        """Within the context, declare the step of this thread's next forward pass."""
        thread = threading.get_ident()
        self._announced[thread] = info
        try:
            yield
        finally:
            self._announced.pop(thread, None)

    def within_step(self, compute: Callable[[], T]) -> T:
        """Call `compute` within a step that the caller has begun: forward passes in it begin none."""
        with self.lock:
            before = self._inside
            try:
                self._inside, self._lone_layer = threading.get_ident(), self._num_layers
                self._is_ordinary = torch_modes.is_ordinary()
                return compute()
            finally:
                self._inside = before

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute MoE layer `layer`'s experts; see `MoeEngine.compute`. Outside of a forward pass, as for a prompt."""
        if self._inside == threading.get_ident():
            if self._is_ordinary:
                return self._living_engine().compute(layer, hidden, ids, weights)
            with torch_modes.kept():
                return self._living_engine().compute(layer, hidden, ids, weights)
        with self.lock:
            self._check()
            try:
                self._inside = threading.get_ident()
                # Layers that are called one after the other are one step.
                with torch_modes.kept():
                    if layer <= self._lone_layer:
                        self._living_engine().begin_step(StepInfo("prefill", 1, len(hidden), is_start=True))
                    self._lone_layer = layer
                    return self._living_engine().compute(layer, hidden, ids, weights)
            finally:
                self._inside = _NO_THREAD

    def _begin(self, arguments: Mapping[str, Any]) -> int:
        """Begin the step of a forward pass with these arguments; return this thread, or _NO_THREAD without tokens."""
        tokens, thread = arguments.get("input_ids"), threading.get_ident()
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            # Of an encoder-decoder whose prompt is encoded: the call of its decoder begins the step.
            return _NO_THREAD
        # A call that encodes a prompt computes one, whatever its decoder has in its cache.
        encodes = arguments.get("encoder_outputs") is None and "decoder_input_ids" in arguments
        cache = None if encodes else given_cache(arguments)
        if tokens.shape[1] != 1:
            self._bounds.check(tokens, cache)
        self._lone_layer = self._num_layers
        self._is_ordinary = torch_modes.is_ordinary()
        info = self._announced.pop(thread, None) or infer_step(tokens, cache)
        with torch_modes.kept():
            self._living_engine().begin_step(info)
        if self._decode_threads is not None and not info.is_prefill:
            torch.set_num_threads(self._decode_threads)
        return thread

    def _living_engine(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise RefusedError(CLOSED)
        return engine

    def _check(self) -> None:
        refuse_compiled()
        if self._is_closed:
            raise RefusedError(CLOSED)
        torch_modes.refuse_autocast(self._device)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RefusedError("deepcopy is not possible on a model with offloaded experts: two cannot share one pool.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RefusedError("pickling is not possible on a model with offloaded experts: load it where it is needed.")


def infer_step(tokens: torch.Tensor, cache: Any) -> StepInfo:
    """Infer an undeclared call's step from its shape.

    Several positions are a prompt, or a part of one: they get the bits that transformers gives them. So do drafted
    tokens of transformers' own assisted generation; our loops declare theirs.

    Args:
        tokens: ids [rows, positions], or embeddings [rows, positions, hidden].
    """
    is_start = cache is None or int(cache.get_seq_length()) == 0
    # Embeddings in place of ids tell nothing about layer 0.
    token_ids = None if tokens.is_floating_point() else tokens
    num_rows, num_positions = tokens.shape[:2]
    phase: Phase = "prefill" if is_start or num_positions > 1 else "decode"
    return StepInfo(phase, num_rows, num_positions, token_ids, is_start=is_start)


def entered(forward: Callable[..., T]) -> Callable[..., T]:
    """Wrap a class's forward, to be entered through its instances' `foreroute.entry`."""
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def through(self: Any, *args: Any, **kwargs: Any) -> T:
        result: T = self.foreroute.entry.forward(forward, names, self, args, kwargs)
        return result

    return through


_ENTRIES: "weakref.WeakSet[StepEntry]" = weakref.WeakSet()


def _after_fork() -> None:
    for entry in list(_ENTRIES):
        entry.forked()


after_fork(_after_fork)
