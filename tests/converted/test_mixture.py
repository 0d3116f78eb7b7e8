"""One model in three files and six types: another one per layer and per gate, up and down, as published mixtures are.

A fifth of the experts is in memory, and the others are read: the same tokens as with all of them, no byte more than
what is stored of those that were read, and no slot larger than an expert of its layer in whole pages.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest

from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.cli import options
from foreroute.cli.commands import plan as plan_command
from foreroute.cli.main import build_parser
from foreroute.engine.interfaces import StepObserver
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.prepare.pack import pack
from foreroute.transfer.base import Completion
from foreroute.types import BLOCK_BYTES, round_down, round_up
from foreroute.units import format_memory
from tests.formats.gguf_writer import Kind, Written, write_copy, write_gguf
from tests.support.checkpoints import save_tokenizer
from tests.support.runs import THREE_PROMPTS, assert_same_bits, expert_table, generate

EXPERTS, TOP_K = 16, 2
# By layer the types of gate, up and down.
MIXTURE = [
    {"gate": Kind.Q4_K, "up": Kind.Q4_K, "down": Kind.Q6_K},
    {"gate": Kind.Q5_K, "up": Kind.Q8_0, "down": Kind.IQ4_NL},
    {"gate": Kind.IQ4_NL, "up": Kind.Q6_K, "down": Kind.F32},
    {"gate": Kind.Q6_K, "up": Kind.Q5_K, "down": Kind.Q8_0},
]
LAYERS = len(MIXTURE)
WAYS = {"ggml": {"math": "ggml"}, "torch": {"math": "torch", "dtype": "float32"}}


@dataclass(frozen=True)
class Mixture:
    """path: the first of three files. made: the model in one file, its numbers, and what is stored of its experts."""

    path: Path
    made: Written

    def nbytes(self, layer: int, expert: int = 0) -> int:
        """Bytes that the file stores of an expert."""
        return sum(raw[expert].nbytes for name, (raw, _) in self.made.experts.items() if f"blk.{layer}." in name)

    def pages_nbytes(self, layer: int, expert: int) -> int:
        """Bytes of the pages of the files that an expert's three parts are in."""
        index, pages = read_gguf(self.path), 0
        for name, (raw, _) in self.made.experts.items():
            if f"blk.{layer}." in name:
                entry = index.tensors[name]
                begin = entry.offset + expert * raw[0].nbytes
                end = min(round_up(begin + raw[0].nbytes), index.files[entry.path].nbytes)
                pages += end - round_down(begin)
        return pages


@pytest.fixture(scope="module")
def mixture(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    made = write_gguf(
        folder / "whole", "qwen3moe", Kind.Q8_0, dense=Kind.Q6_K, layers=MIXTURE, num_hidden_layers=LAYERS,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, head_dim=64,
    )  # fmt: skip
    reader = gguf.GGUFReader(made.path)
    per_part = -(-len(reader.tensors) // 3)
    write_copy(reader, gguf.GGUFWriter(folder / "model.gguf", "qwen3moe", split_max_tensors=per_part), stride=3)
    save_tokenizer(folder)
    first, *others = sorted(folder.glob("model-*.gguf"))
    assert len(others) == 2
    return Mixture(first, made)


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The bytes of every read by the engine inside."""
    preadv, calls = os.preadv, list[int]()

    def counting(*args: Any) -> int:
        calls.append(preadv(*args))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        yield calls


class Arrivals(StepObserver):
    """Which experts were read, how often, and what was told of their bytes."""

    def __init__(self) -> None:
        self.keys = Counter[int]()
        self.nbytes = 0

    def arrived(self, completions: Sequence[Completion]) -> None:
        self.keys.update(completion.key for completion in completions)
        self.nbytes += sum(completion.nbytes for completion in completions)


def test_the_file_is_a_mixture(mixture: Mixture) -> None:
    index = read_gguf(mixture.path)
    assert len(index.files) == 3
    assert {index.kinds[name] for name in mixture.made.experts} == {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "F32"}
    assert len({mixture.nbytes(layer) for layer in range(LAYERS)}) == LAYERS, "no two layers store as much"
    apart = [{index.tensors[f"blk.{at}.ffn_{one}_exps.weight"].path for one in MIXTURE[at]} for at in range(LAYERS)]
    assert [*map(len, apart)] == [3] * LAYERS, "an expert's parts are in three files"


@pytest.mark.parametrize("way", WAYS)
def test_tokens_at_a_fifth_are_those_with_all_in_memory(way: str, mixture: Mixture, load: Callable[..., Any]) -> None:
    if way == "ggml":
        pytest.importorskip("libggml")
    resident = load(mixture.path, "100%", prefetch="none", **WAYS[way])
    assert resident.foreroute.plan.num_slots == LAYERS * EXPERTS
    expected = {"one": generate(resident), "three": generate(resident, THREE_PROMPTS)}
    assert expected["one"].num_distinct > 5
    if way == "torch":
        assert_same_bits(expected["one"], generate(mixture.made.resident))
    for prefetch in ("none", "lookahead"):
        model = load(mixture.path, "20%", prefetch=prefetch, **WAYS[way])
        assert model.foreroute.plan.num_slots <= 0.2 * LAYERS * EXPERTS + 1
        assert_same_bits(generate(model), expected["one"])
        decode = model.foreroute.stats().decode
        assert decode.misses > 0
        assert (decode.prefetch_used > 0) == (prefetch != "none")
        assert_same_bits(generate(model, THREE_PROMPTS), expected["three"])


@pytest.mark.parametrize("prefetch", ["none", "lookahead"])
def test_bytes_are_those_stored_of_what_was_read(prefetch: str, mixture: Mixture, load: Callable[..., Any]) -> None:
    """Each part by one read of whole pages, and nothing else of the experts' tensors."""
    model = load(mixture.path, "20%", prefetch=prefetch)
    pool, seen = model.foreroute.engine.pool, Arrivals()
    pool.add_observer(seen)
    with counted_reads() as calls:
        generate(model)
        pool.drain()
    stats, keys = model.foreroute.stats(), model.foreroute.table.keys
    counts = [stats.prefill, stats.decode]
    stored = sum(times * mixture.nbytes(*keys.expert_id(key)) for key, times in seen.keys.items())
    num_experts = sum(seen.keys.values())
    assert sum(one.demand_loads + one.prefetch_loads for one in counts) == num_experts > 20 * TOP_K
    assert sum(one.demand_bytes + one.prefetch_bytes for one in counts) == seen.nbytes == stored
    assert pool.transfer.reads == 3 * num_experts == len(calls)
    pages = sum(times * mixture.pages_nbytes(*keys.expert_id(key)) for key, times in seen.keys.items())
    assert stored < stats.read_bytes == sum(calls) == pages
    decode = stats.decode
    loads, nbytes = decode.demand_loads + decode.prefetch_loads, decode.demand_bytes + decode.prefetch_bytes
    print(f"{prefetch}: per token {loads / decode.tokens:.1f} experts read, {nbytes / decode.tokens / 1e3:.1f} kB")


def test_no_slot_holds_more_than_its_layers_expert_in_whole_pages(mixture: Mixture, load: Callable[..., Any]) -> None:
    model = load(mixture.path, "20%")
    handle = model.foreroute
    lengths = handle.table.slot_lengths
    due = [round_up(mixture.nbytes(layer)) for layer in range(LAYERS)]
    layers = [int(layer.name.split(".")[2]) for layer in handle.table.layers]
    assert [*lengths] == [due[layer] for layer in layers]
    assert {length for length, _ in handle.plan.slot_classes} == set(due)
    assert handle.plan.pool_bytes <= handle.plan.memory_bytes
    # And what the engine has: a layer's slots are those of its length alone.
    slots = [part.slots for part in handle.engine.pool.by_layer]
    assert [len(one) for one in slots] == [dict(handle.plan.slot_classes)[length] for length in lengths]
    assert not set(slots[0]) & set(slots[1])


@pytest.fixture(scope="module")
def store(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "experts.foreroute"
    pack(expert_table(mixture.path), path, progress=lambda done, total: None)
    return path


def test_packed_an_expert_is_one_aligned_record(mixture: Mixture, store: Path, load: Callable[..., Any]) -> None:
    for way in WAYS.values():
        model = load(mixture.path, "20%", packed=str(store), **way)
        assert model.foreroute.plan.source == "packed"
        assert_same_bits(generate(model), generate(load(mixture.path, "100%", **way)))
        table = model.foreroute.table
        opened = open_checkpoint(mixture.path, None, str(store)).store
        assert opened is not None
        reads_of = opened.reads_of(table)
        for key in table.keys.all():
            (read,) = reads_of(key)
            assert read.is_direct
            assert read.offset % BLOCK_BYTES == 0
            assert read.nbytes == mixture.nbytes(*table.keys.expert_id(key))
        assert model.foreroute.engine.pool.transfer.reads == sum(
            one.demand_loads + one.prefetch_loads
            for one in (model.foreroute.stats().prefill, model.foreroute.stats().decode)
        )


def _planned(path: Path, *flags: str) -> plan_command.Findings:
    args = build_parser().parse_args(["plan", str(path), "--memory", "20%", *flags])
    return plan_command.find(path, args, options.engine_config(args))


def test_plan_says_what_packing_gains(mixture: Mixture, store: Path) -> None:
    found, packed = _planned(mixture.path), _planned(mixture.path, "--packed", str(store))
    assert (found.reading.reads, packed.reading.reads) == (3, 1)
    stored = sum(mixture.nbytes(layer) for layer in range(LAYERS)) // LAYERS
    assert packed.reading.nbytes == found.reading.packed_nbytes
    assert stored <= found.reading.packed_nbytes < found.reading.nbytes <= stored + 3 * 2 * BLOCK_BYTES
    (hint,) = [hint for hint in plan_command.advice(found, "MODEL") if "foreroute pack MODEL" in hint]
    now, then = format_memory(found.reading.nbytes), format_memory(found.reading.packed_nbytes)
    assert "an expert becomes one aligned read without a copy (now 3 reads and copies)" in hint
    assert f"{then} in whole pages in place of {now}" in hint
    # Beside the records: a header and checksums.
    records = found.plan.total_slots * found.plan.slot_bytes
    assert f"It takes {format_memory(records, round_up=True)} of disk" in hint
    assert records < store.stat().st_size < records + 2**16
    assert not [hint for hint in plan_command.advice(packed, "MODEL") if "foreroute pack" in hint]
    told = plan_command.as_json(found)["plan"]
    assert (told["reads_per_expert"], told["read_bytes_per_expert"]) == (3, found.reading.nbytes)
    assert told["packed_bytes_per_expert"] == found.reading.packed_nbytes
