"""Compare a packed store's experts and dense weights with what packing the checkpoint anew makes, byte for byte."""

from collections.abc import Collection

import torch

from foreroute.checkpoint.codecs import CODECS, STORED, orders_of, types_in
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.ggml.form import is_in_blocks
from foreroute.kernels.ggml.library import open_library
from foreroute.loading.block_kernels import dense_type
from foreroute.model.build.skeleton import Outline
from foreroute.prepare.pack import RecordMaker
from foreroute.prepare.quantise import DenseQuantiser, Int4Blocks, Quantiser
from foreroute.transfer.disk import DiskTransfer, own_reader


def is_made_by_pack(table: ExpertTable) -> bool:
    """Whether blocks of these experts, as the checkpoint stores them, are made by `pack`: it has none of its own."""
    return not any(is_in_blocks(layer) for layer in in_blocks(table).layers)


def other_records(store: PackedStore, source: ExpertTable, keys: Collection[int]) -> set[int]:
    """Find experts whose record in `store` is not what packing their bytes in the checkpoint would write.

    Args:
        source: the experts as the checkpoint stores them, by which the store was opened. keys: of those to compare.
    Raises:
        ReadError, ChecksumError: one cannot be read.
    Cost: each of them is read twice, and quantised.
    """
    codec = CODECS[store.codec]
    if codec.name == STORED:
        types = types_in(store.table)
        source = source if types else in_blocks(source)
        encoder: Int4Blocks | Quantiser = Int4Blocks(source, types)
    else:
        encoder = Quantiser(source, codec, open_library(), measured=0)
    maker = RecordMaker(source, encoder, orders_of(store.table))
    found = set()
    with (
        own_reader(source.reads, 1, source.slot_bytes, label=source.label) as of_source,
        own_reader(store.reads_of(store.table), 1, store.table.slot_bytes, label=store.table.label) as of_store,
    ):
        for key in sorted(keys):
            layer, _ = source.expert_id(key)
            nbytes = store.table.layers[layer].layout.record_bytes
            if maker.make(key, _read(key, *of_source))[:nbytes] != _read(key, *of_store)[:nbytes]:
                found.add(key)
    return found


def other_dense(store: PackedStore, sketch: Outline) -> set[str]:
    """Find dense weights, by their names in the model, of which `store` holds other blocks than packing would write.

    Args:
        sketch: the model's outline.
    Raises:
        ReadError, ChecksumError: one cannot be read.
    Cost: all of them are read twice, and quantised.
    """
    if not store.dense.kind:
        return set()
    library = open_library()
    kind = dense_type(store.dense.kind, sketch, library)
    quantiser = DenseQuantiser(sketch, kind, library, torch.get_num_threads())
    found = set()
    for ours, stored in sketch.linear.stored.items():
        fresh = quantiser.blocks(stored)
        packed = bytearray(len(fresh))
        store.read_dense(stored, memoryview(packed))
        if packed != fresh:
            found.add(ours)
    return found


def _read(key: int, transfer: DiskTransfer, slots: list[memoryview]) -> memoryview:
    """The bytes of expert `key`, in the only slot."""
    transfer.demand(key, 0)
    (completion,) = transfer.wait()
    if completion.error is not None:
        raise completion.error
    return slots[0]
