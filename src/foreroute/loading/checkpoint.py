"""Open a checkpoint: find its files, read their headers, map its experts to bytes; no weight is read yet."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.locate import locate, read_index
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import PackedStore, open_store, quantised_beside
from foreroute.kernels.ggml.interleaved import check_orders
from foreroute.kernels.ggml.library import Library
from foreroute.loading.expert_math import forms_of_layers, math_of_layers
from foreroute.model.blocks import probe
from foreroute.model.build.packed_dense import check_packed
from foreroute.model.build.skeleton import Outline, offloaded_modules, outline
from foreroute.model.build.stored_names import tell
from foreroute.model.expert_set import ExpertSet


@dataclass(frozen=True)
class Checkpoint:
    """folder: of the checkpoint, or its GGUF file. outline: of the model. store: its packed store, or None.

    table: the experts as the checkpoint's files are read. has_one_slot_length: see `ExpertTable`; of `kept`.
    """

    folder: Path
    index: CheckpointIndex
    outline: Outline
    store: PackedStore | None
    table: ExpertTable
    has_one_slot_length: bool = False

    @property
    def kept(self) -> ExpertTable:
        """The experts as they will be read."""
        table = self.table if self.store is None else self.store.table
        return replace(table, has_one_slot_length=self.has_one_slot_length)

    @property
    def packed_dense(self) -> str:
        """The type of blocks in which the packed store holds dense weights; "" where it holds none."""
        return "" if self.store is None else self.store.dense.kind

    def in_blocks(self) -> "Checkpoint":
        """The same with experts laid out as ggml's kernels multiply them, where that moves bytes only."""
        return replace(self, table=in_blocks(self.table))

    @property
    def stored_dtype(self) -> str:
        """The experts' dtype or codec, for the plan."""
        if self.store is not None and self.store.codec != STORED:
            return self.store.codec
        source = self.outline.table
        return source.stored_as or source.layers[0].layout.parts[0].dtype


def open_checkpoint(
    path_or_hub_id: str | Path, revision: str | None, packed: str, access: HubAccess | None = None
) -> Checkpoint:
    """Find a checkpoint and read its headers; a hub id is downloaded first.

    Args:
        packed: as EngineConfig.packed. access: to the hub, if not by the environment's settings.
    Raises:
        CheckpointError, UnsupportedModelError, StoreError: see errors.py.
    """
    folder = locate(path_or_hub_id, revision=revision, access=access)
    index = read_index(folder)
    sketch = outline(folder, index)
    store = open_store(folder, packed, sketch.table)
    if store is None and packed == "auto":
        tell(_unused(quantised_beside(folder, sketch.table)), folder)
    if store is not None:
        check_packed(store, sketch.linear)
        check_orders(store.table, store.path)
    return Checkpoint(folder, index, sketch, store, sketch.table)


def _unused(stores: list[str]) -> list[str]:
    """Say that quantised stores are beside the checkpoint, which only their names make use of."""
    if not stores:
        return []
    own = " or ".join(f"--packed {name}" for name in stores)
    return [f"a quantised packed store is beside it and is not used, as it changes the output; {own} uses it"]


def find_experts(model: PreTrainedModel, checkpoint: Checkpoint, library: Library | None = None) -> ExpertSet:
    """Describe the experts of a model that was built without them: layers in call order, bytes, and kernels.

    Args:
        library: ggml's, where it computes what is stored in blocks.

    Raises:
        UnsupportedModelError: some experts are never called by a plain forward.
    """
    layers = probe(model, offloaded_modules(model))
    order = [layer.name for layer in layers]
    source, table = checkpoint.outline.table.reordered(order), checkpoint.kept.reordered(order)
    forms, no_form = forms_of_layers(layers, table, library)
    math = math_of_layers(layers, table, model.dtype, forms)
    device = torch.device("cpu")
    return ExpertSet(
        tuple(layers), table, source, checkpoint.store, tuple(math), tuple(forms), model.dtype, device, no_form
    )
