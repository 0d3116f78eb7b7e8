"""Decode with one CUDA graph per batch size: a token is one launch, and no part of it waits for the host.

The model's own forward is captured, over a cache of fixed size whose position is a tensor that the graph advances. On
the CPU the same step runs without a graph, for tests.
"""

from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from foreroute.device.tier import DeviceTier
from foreroute.engine.chunks import split_prompt
from foreroute.engine.interfaces import StepInfo
from foreroute.errors import PromptError, RefusedError
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model import torch_modes
from foreroute.model.caches import cache_argument
from foreroute.transfer.memory import out_of_memory_named

# Batch sizes that have a graph.
BATCH_SIZES = (1, 2, 4, 8)
_WARM_UP_STEPS = 2


class _ScalarsOnDevice(TorchFunctionMode):
    """While active, `torch.tensor(number)` fills device memory instead of copying from the host.

    transformers makes some masks that way (5.17), and such a copy cannot be captured. The values are the same.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], bool | int | float):
            return torch.full((), *args, **kwargs)
        return func(*args, **kwargs)


class GraphDecoder:
    """Decodes one batch of texts of equal length by a graph. Prompts are computed eagerly.

    Args:
        model: of `foreroute.load(..., control="device")`.
        rows: one of BATCH_SIZES. max_length: tokens, prompt and answer, that the cache holds.

    Attributes:
        logits: [rows, vocabulary], of the last token; the same memory for every step.
        max_length: tokens that the cache holds.

    Raises:
        RefusedError: the model has another control plane, or this number of rows has no graph.
        DeviceError: the cache or the graph does not fit the GPU.
    """

    def __init__(self, model: OffloadedModel, rows: int, max_length: int) -> None:
        tier = model.foreroute.engine
        if not isinstance(tier, DeviceTier):
            raise RefusedError('Graphs need the device control plane: EngineConfig(control="device").')
        if rows not in BATCH_SIZES or rows > tier.most_rows:
            possible = [size for size in BATCH_SIZES if size <= tier.most_rows]
            raise RefusedError(
                f"There is no decode graph for {rows} rows, but for {possible}: the memory has to hold all that the "
                "rows use in one layer."
            )
        self._model = model
        self._tier = tier
        self.max_length = max_length
        self._device = model.device
        self._length = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch_modes.kept():
            self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self._device)
            self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=self._device)
            self.logits = torch.empty(0, dtype=torch.float32)
            self._cache = self._new_cache()
        self._decode_step = StepInfo.of("decode", self._tokens)

    @property
    def is_captured(self) -> bool:
        """Whether the graph has been captured, so that a step is one launch."""
        return self._graph is not None

    def prefill(self, ids: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
        """Start over with prompts `ids` [rows, tokens], in chunks of `chunk`; return last logits [rows, vocabulary].

        Raises:
            PromptError: the prompts do not fit the cache.
        """
        with self._model.foreroute.lock, torch_modes.kept():
            return self._prefill(ids, chunk)

    def _prefill(self, ids: torch.Tensor, chunk: int | None) -> torch.Tensor:
        self._check_length(ids.shape[1])
        ids = ids.to(self._device)
        # In place: the graph reads this memory.
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        done = 0
        for part in split_prompt(ids, chunk):
            self._tier.begin_step(StepInfo.of("prefill", part, is_start=done == 0))
            positions = torch.arange(done, done + part.shape[1], device=self._device).expand(len(ids), -1)
            with torch.no_grad():
                logits = self._forward(part, positions)
            done += part.shape[1]
        self._length = done
        self._positions.fill_(done)
        self.logits = logits[:, -1].clone() if self._graph is None else self.logits.copy_(logits[:, -1])
        return self.logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [rows, 1]; return the next logits [rows, vocabulary]. Does not wait for the device.

        Raises:
            PromptError: the cache is full. DeviceError: the graph, made at the first step, does not fit.
        """
        with self._model.foreroute.lock, torch_modes.kept():
            return self._step(tokens)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._check_length(self._length + 1)
        self._tokens.copy_(tokens)
        if self._device.type == "cuda" and self._graph is None:
            with out_of_memory_named("the decode graph", "Lower --memory, or use fewer rows."):
                self._capture()
        if self._graph is None:
            self._tier.begin_step(self._decode_step)
            self.logits = self._run()
        else:
            self._tier.prepare_decode()
            self._graph.replay()
            self._tier.replayed(len(self._tokens))
        self._length += 1
        return self.logits

    def _new_cache(self) -> StaticCache:
        cache = StaticCache(config=self._model.config, max_cache_len=self.max_length)
        # Full layers instead of sliding windows, whose bookkeeping in Python a graph would freeze: the mask still
        # applies the window.
        cache.layers = [StaticLayer(max_cache_len=self.max_length) for _ in cache.layers]
        return cache

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # The step has begun: inferring what begins would copy the cache's length to the host.
        output = self._model.foreroute.entry.within_step(
            lambda: self._model.forward(
                input_ids=tokens,
                position_ids=positions,
                **cache_argument(self._cache),
                use_cache=True,
                return_dict=True,
            )
        )
        return cast(torch.Tensor, output.logits)

    def _run(self) -> torch.Tensor:
        """Run one step, as captured."""
        with torch.no_grad(), _ScalarsOnDevice():
            logits = self._forward(self._tokens, self._positions)[:, -1]
            self._positions.add_(1)
        return logits

    def _capture(self) -> None:
        """Warm up with a few steps, as capturing requires, restore the state they changed, and capture the graph."""
        self._tier.begin_step(self._decode_step)
        lengths = [layer.cumulative_length for layer in self._cache.layers]
        counted = [self._positions, self._tier.state.counters, *lengths]
        before = [tensor.clone() for tensor in counted]
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._run()
                # Cache entries written behind the text's end are overwritten by the real step.
                for tensor, value in zip(counted, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._run()
        self._graph = graph

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise PromptError(f"The cache holds {self.max_length} tokens; {length} are needed. Make it longer.")


def is_paged(model: OffloadedModel) -> bool:
    """Whether the model's experts are paged by its device, so that a `GraphDecoder` decodes."""
    return isinstance(model.foreroute.engine, DeviceTier)


def decoder_of(model: OffloadedModel, max_length: int) -> GraphDecoder | None:
    """Return the model's one-row decoder for texts of up to `max_length` tokens; None without the device tier.

    Made at the first answer, for the plan's `kv_tokens` at least, and again for a longer text.

    Raises:
        DeviceError: its cache does not fit.
    """
    if not is_paged(model):
        return None
    handle = model.foreroute
    if handle.decoder is None or handle.decoder.max_length < max_length:
        handle.decoder = None  # free its memory first
        handle.decoder = GraphDecoder(model, 1, max(max_length, handle.plan.kv_tokens))
    return handle.decoder
