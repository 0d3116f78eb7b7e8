"""Whether ggml's kernels compute a model's blocks, and why not where they do not."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.assembly import GGUF_PREFIX, MXFP4_IN_BLOCKS
from foreroute.checkpoint.codecs import INT4_CODINGS, INT4_TYPES, STORED, codecs_that_fit, misfit_for_types
from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.quantised_formats import QuantisedFormat
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.ggml.graph import Runner, shared_runner
from foreroute.kernels.ggml.known_answers import check_types
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.library import GgmlError, Library, open_library
from foreroute.kernels.ggml.linear import BlockProducts, keep_router_alike
from foreroute.kernels.ggml.types import BlockType
from foreroute.loading.checkpoint import Checkpoint
from foreroute.model.blocks import MoeLayer
from foreroute.model.build.dense_blocks import (
    DenseBlocks,
    MatrixSource,
    QuantisedMatrices,
    StoredMatrices,
    check_rows,
    int4_saving,
    quantised_nbytes,
)
from foreroute.model.build.packed_dense import PackedMatrices
from foreroute.model.build.skeleton import Outline
from foreroute.model.decode.attention import group_heads
from foreroute.model.decode.layers import fuse_layers, fuse_routers
from foreroute.model.decode.norms import fuse_norms
from foreroute.model.gguf.blocks import GgufMatrices, dense_block_nbytes

# torch's threads while a token is decoded: its products are ggml's then, whose threads poll for the next graph, and two
# pools that spin on the same cores stop each other (docs/LOG.md).
DECODE_THREADS = 1


@dataclass(frozen=True)
class BlockKernels:
    """ggml's kernels, opened and tested for the types of one checkpoint.

    has_expert_blocks: experts are stored in blocks. dense: the type that dense weights of safetensors are to have; None
    as they are stored. packed: the store that holds them in it; None where they are quantised when they are loaded.
    """

    runner: Runner
    products: BlockProducts
    has_expert_blocks: bool
    dense: BlockType | None = None
    packed: PackedStore | None = None

    def dense_nbytes(self, sketch: Outline) -> int:
        """Bytes of the dense weights of the model in memory."""
        index = sketch.table.index
        if isinstance(index, GgufIndex) and sketch.gguf is not None:
            return dense_block_nbytes(index, sketch.gguf, self.products)
        kind = self.dense or (self.runner.library.types["BF16"] if self.has_expert_blocks else None)
        if kind is None:
            return sketch.dense_nbytes
        nbytes = quantised_nbytes(sketch.linear, kind, index, sketch.dense_nbytes)
        if self.dense is None and sketch.form is not None:
            nbytes -= int4_saving(sketch.linear, sketch.form, sketch.matrices, index, self.products)
        return nbytes

    def dense_blocks(self, sketch: Outline, dtype: torch.dtype | str) -> tuple[torch.dtype | str, DenseBlocks | None]:
        """The compute dtype, and the dense weights that are blocks.

        Where experts are in blocks too it is f32 unless another one was asked for: ggml's products begin and end there.
        """
        index = sketch.table.index
        source: MatrixSource
        if isinstance(index, GgufIndex) and sketch.gguf is not None:
            source = GgufMatrices(index, sketch.gguf, self.products)
        elif self.dense is not None and self.packed is not None:
            source = PackedMatrices(sketch.linear, self.packed, self.dense)
        elif self.dense is not None:
            source = QuantisedMatrices(sketch.linear, self.dense, self.products.library, self.runner.num_threads)
        elif self.has_expert_blocks:
            # torch has one thread while a token is decoded.
            source = StoredMatrices(sketch.linear, index, sketch.matrices, self.products)
        else:
            return dtype, None
        # Experts in floats are computed as they are stored: another dtype would convert them at every use.
        usual = torch.float32 if self.has_expert_blocks else sketch.config.dtype
        compute = next(one for one in (dtype, usual, torch.float32) if isinstance(one, torch.dtype))
        return compute, DenseBlocks(source, self.products, compute)

    def quicken(self, model: PreTrainedModel) -> None:
        """Take less time for what is beside the products while a token is decoded: norms and attention."""
        fuse_norms(model)
        group_heads(model, self.runner)
        fuse_layers(model, self.products)

    def keep_rows_alike(self, model: PreTrainedModel, engine: Any, layers: Sequence[MoeLayer]) -> None:
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
        fuse_routers(model, layers)


def open_block_kernels(
    asked: EngineConfig, checkpoint: Checkpoint, target: torch.device
) -> tuple[BlockKernels | None, str]:
    """Open ggml for a checkpoint whose weights are or can be laid out in blocks: the kernels, or None and the reason.

    The reason is empty where there is nothing to tell: torch was asked for, or there are no blocks.

    Raises:
        GgmlError, UnsupportedModelError: --math ggml or --dense was asked for and cannot be had.
    """
    dense = _asked_dense(asked, checkpoint)
    if asked.math == "torch" and not dense:
        return None, ""
    must = bool(dense) or asked.math == "ggml"
    where, kinds = _why_not_here(asked, target), _kinds(checkpoint)
    reason = where or ("" if dense or checkpoint.packed_dense else _why_no_blocks(checkpoint, kinds))
    if reason and must:
        raise UnsupportedModelError(f"{_asked_for(asked)}: {reason}.")
    if reason:
        is_slow = _is_packed_apart(checkpoint) or bool(_why_dequantised(checkpoint))
        return None, reason if is_slow and not where else ""
    try:
        return _opened(checkpoint, kinds, dense), ""
    except GgmlError as error:
        if must:
            raise
        return None, str(error).rstrip(".")


def _asked_dense(asked: EngineConfig, checkpoint: Checkpoint) -> str:
    """The type of --dense, "" where dense weights are kept as they are stored. Raises: see `open_block_kernels`."""
    packed = checkpoint.packed_dense
    if asked.dense == "stored":
        return ""
    if packed:
        raise UnsupportedModelError(
            f"--dense {asked.dense}: the packed store's dense weights are in {packed.lower()} already. Leave --dense "
            "out, or take a store without them (--packed)."
        )
    return asked.dense.upper()


def _opened(checkpoint: Checkpoint, kinds: set[str], dense: str) -> BlockKernels:
    """ggml's kernels, tested for these `kinds`. Raises: see `open_block_kernels`."""
    library = open_library()
    # Of dense weights, some after their numbers.
    others = {"BF16", "F16"} if kinds else set()
    if kinds and checkpoint.outline.form is not None and checkpoint.outline.form.coding.kind in INT4_CODINGS:
        others |= {*INT4_TYPES}
    packed = checkpoint.packed_dense
    check_types(library, sorted(kinds | others | {one for one in (dense, packed) if one}))
    runner = shared_runner(torch.get_num_threads())
    kernels = BlockKernels(runner, BlockProducts(runner), bool(kinds))
    if packed:
        return replace(kernels, dense=_type_of(packed, library), packed=checkpoint.store)
    return replace(kernels, dense=dense_type(dense, checkpoint.outline, library)) if dense else kernels


def _asked_for(asked: EngineConfig) -> str:
    return "--math ggml" if asked.math == "ggml" else f"--dense {asked.dense}, which ggml's kernels compute"


def dense_type(dense: str, sketch: Outline, library: Library) -> BlockType:
    """The type of blocks `dense` (Q8_0) for the dense weights of `sketch`, once they can have it.

    Raises:
        UnsupportedModelError: they are in few bits already, or their rows are no whole blocks. GgmlError: no such type.
    """
    already = ""
    if isinstance(sketch.table.index, GgufIndex):
        already = "a GGUF file stay in its own blocks"
    elif (form := format_of_dense(sketch)) is not None and form.coding.kind in INT4_CODINGS:
        already = f"this checkpoint are four-bit integers ({form.name}) already, which blocks hold"
    if already:
        raise UnsupportedModelError(f"--dense {dense.lower()}: the dense weights of {already}. Leave it out.")
    kind = _type_of(dense, library)
    check_rows(sketch.linear, kind, library.types)
    return kind


def _type_of(name: str, library: Library) -> BlockType:
    if name not in library.types:
        raise GgmlError(f"ggml {library.version} has no {name}. Take another --dense.")
    return library.types[name]


def format_of_dense(sketch: Outline) -> QuantisedFormat | None:
    """The published format of the dense matrices that --dense would quantise; None where all are floats."""
    return None if sketch.matrices.keys().isdisjoint(sketch.linear.stored.values()) else sketch.form


def note_of(asked: EngineConfig, reason: str) -> str:
    """The line for users where torch computes what ggml's kernels might; "" without a reason.

    Raises:
        UnsupportedModelError: --math ggml was asked for.
    """
    if reason and asked.math == "ggml":
        raise UnsupportedModelError(f"--math ggml: {reason}.")
    if not reason:
        return ""
    return f"Quantised weights are dequantised by torch at each use, much slower than ggml's kernels: {reason}."


def _why_not_here(asked: EngineConfig, target: torch.device) -> str:
    if asked.math == "torch":
        return "torch was asked for"
    return "ggml's kernels here run on the CPU" if target.type != "cpu" or asked.control == "device" else ""


def _why_no_blocks(checkpoint: Checkpoint, kinds: set[str]) -> str:
    if _is_packed_apart(checkpoint):
        return (
            "the packed store has MXFP4's blocks and exponents apart, as earlier versions packed them; "
            "`foreroute pack --force` packs it for them"
        )
    if checkpoint.store is not None and checkpoint.store.codec != STORED and not checkpoint.kept.layers[0].parts:
        return f"a packed store of {checkpoint.store.codec} experts is computed by torch"
    if not kinds:
        return (
            _why_dequantised(checkpoint)
            or "the weights are not stored in blocks, as those of a GGUF file or of `foreroute pack --quant` are"
        )
    return ""


def _why_dequantised(checkpoint: Checkpoint) -> str:
    """Why torch dequantises experts of a published format, and what to do; "" where none are in one, or nothing helps.

    For checkpoints without blocks.
    """
    table, folder = checkpoint.outline.table, checkpoint.folder
    fits = codecs_that_fit(table)
    quant = next((name for name in ("q8_0", "q4_1") if name in fits), "")
    if not table.stored_as or not quant:
        return ""
    quantise = f"`foreroute pack {folder} --quant {quant}` rounds them to blocks, for --packed {quant}"
    if any(misfit_for_types(layer) == "" for layer in table.layers):
        force = " --force" if checkpoint.store is not None else ""
        exactly = f"`foreroute pack {folder}{force}` writes what its blocks hold exactly in these"
        advice = f"{exactly}; {quantise}"
    else:
        advice = quantise
    return f"it has no products of {table.stored_as}; {advice}"


def dense_nbytes_at_load(asked: EngineConfig, checkpoint: Checkpoint, target: torch.device) -> int:
    """Bytes of the dense weights in memory, as `load` counts them before it reads them.

    Raises:
        GgmlError, UnsupportedModelError: as `open_block_kernels`.
    """
    kernels, _ = open_block_kernels(asked, checkpoint, target)
    return checkpoint.outline.dense_nbytes if kernels is None else kernels.dense_nbytes(checkpoint.outline)


def _is_packed_apart(checkpoint: Checkpoint) -> bool:
    kept = checkpoint.kept
    return checkpoint.store is not None and in_blocks(kept) is not kept


def _kinds(checkpoint: Checkpoint) -> set[str]:
    """The types of blocks in which weights are stored: of experts as they will be read, and of a GGUF's dense part."""
    kept = checkpoint.in_blocks().kept
    codings = {matrix.coding.kind for layer in kept.layers for part in layer.parts for matrix in part.matrices}
    kinds = {kind.removeprefix(GGUF_PREFIX) for kind in codings if kind.startswith(GGUF_PREFIX)}
    dense = checkpoint.index.kinds.values() if isinstance(checkpoint.index, GgufIndex) else ()
    return kinds | {*dense} | ({"MXFP4"} if MXFP4_IN_BLOCKS in codings else set())
