"""Whether ggml's kernels compute a model's blocks, and why not where they do not."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.config import EngineConfig
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.ggml.graph import Runner, shared_runner
from foreroute.kernels.ggml.known_answers import check_types
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.library import GgmlError, open_library
from foreroute.kernels.ggml.linear import BlockProducts
from foreroute.kernels.ggml.router import keep_router_alike
from foreroute.loading.checkpoint import Checkpoint
from foreroute.model.blocks import MoeLayer
from foreroute.model.build.dense_blocks import DenseBlocks, dense_block_nbytes
from foreroute.model.decode_attention import group_heads
from foreroute.model.norms import fuse_norms

# torch's threads while a token is decoded: its products are ggml's then, whose threads poll for the next graph, and two
# pools that spin on the same cores stop each other (docs/LOG.md).
DECODE_THREADS = 1


@dataclass(frozen=True)
class BlockKernels:
    """ggml's kernels, opened and tested for the types of one checkpoint."""

    runner: Runner
    products: BlockProducts

    def dense_nbytes(self, index: CheckpointIndex) -> int:
        """Bytes of the dense weights of `index` in memory."""
        assert isinstance(index, GgufIndex)
        return dense_block_nbytes(index, self.products)

    def dense_blocks(self, index: CheckpointIndex, dtype: torch.dtype | str) -> tuple[torch.dtype, DenseBlocks]:
        """The compute dtype, f32 unless another one was asked for, and the dense weights of `index` in blocks."""
        assert isinstance(index, GgufIndex)
        compute = dtype if isinstance(dtype, torch.dtype) else torch.float32
        return compute, DenseBlocks(index, self.products, compute)

    def quicken(self, model: PreTrainedModel) -> None:
        """Take less time for what is beside the products while a token is decoded: norms and attention."""
        fuse_norms(model)
        group_heads(model, self.runner.num_threads)

    def keep_rows_alike(self, engine: Any, layers: Sequence[MoeLayer]) -> None:
        """Give each row of a step of single tokens the bits that it has alone, in dense products, routers and experts.

        Args:
            engine: says which kind of step runs; it is not kept alive.
        """
        step: Callable[[], Any] = weakref.ref(engine)

        def decodes() -> bool:
            return not getattr(step(), "is_prefill", True)

        self.products.decodes = decodes
        for kernel in engine.kernels:
            if isinstance(kernel, GgmlLayer):
                kernel.decodes = decodes
        for layer in layers:
            if layer.router is not None:
                keep_router_alike(layer.router.module, self.products)


def open_block_kernels(
    asked: EngineConfig, checkpoint: Checkpoint, target: torch.device
) -> tuple[BlockKernels | None, str]:
    """Open ggml for a checkpoint whose weights are stored in blocks: the kernels, or None and the reason.

    Raises:
        GgmlError, UnsupportedModelError: --math ggml was asked for and cannot be had.
    """
    reason = _why_not(asked, checkpoint, target)
    if not reason:
        assert isinstance(checkpoint.index, GgufIndex)
        try:
            library = open_library()
            check_types(library, sorted(set(checkpoint.index.kinds.values())))
            runner = shared_runner(torch.get_num_threads())
            return BlockKernels(runner, BlockProducts(runner)), ""
        except GgmlError as error:
            if asked.math == "ggml":
                raise
            return None, str(error)
    if asked.math == "ggml":
        raise UnsupportedModelError(f"--math ggml: {reason}.")
    return None, ""


def dense_nbytes_at_load(asked: EngineConfig, checkpoint: Checkpoint, target: torch.device) -> int:
    """Bytes of the dense weights in memory, as `load` counts them before it reads them.

    Raises:
        GgmlError, UnsupportedModelError: as `open_block_kernels`.
    """
    kernels, _ = open_block_kernels(asked, checkpoint, target)
    return checkpoint.outline.dense_nbytes if kernels is None else kernels.dense_nbytes(checkpoint.index)


def _why_not(asked: EngineConfig, checkpoint: Checkpoint, target: torch.device) -> str:
    if asked.math == "torch":
        return "torch was asked for"
    if target.type != "cpu" or asked.control == "device":
        return "ggml's kernels here run on the CPU"
    if not isinstance(checkpoint.index, GgufIndex):
        return "the weights are not stored in blocks, as those of a GGUF file are"
    if checkpoint.store is not None and checkpoint.store.codec != STORED:
        return f"a packed store of {checkpoint.store.codec} experts is computed by torch"
    return ""
