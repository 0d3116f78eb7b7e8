"""Running models and comparing what they say, bit for bit."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import STORE_NAME
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from tests.support.families import PAD_ID, VOCAB_SIZE

NEW_TOKENS = 32
_SAME_WIDTH_INT = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Batch:
    """Token ids [rows, positions], padded on the left, and their attention mask."""

    ids: torch.Tensor
    mask: torch.Tensor


def make_batch(*lengths: int, seed: int = 1) -> Batch:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(0, VOCAB_SIZE - 8, (length,), generator=generator)
        mask[row, -length:] = 1
    return Batch(ids, mask)


ONE_PROMPT = make_batch(14)
THREE_PROMPTS = make_batch(5, 14, 9)


@dataclass(frozen=True)
class Output:
    """Token ids [rows, positions], and the logits [rows, vocabulary] that each new one was chosen from."""

    tokens: torch.Tensor
    logits: tuple[torch.Tensor, ...]

    @property
    def num_distinct(self) -> int:
        """Distinct tokens: a model that repeats itself tests little."""
        return len(set(self.tokens.flatten().tolist()))


def generate(model: Any, batch: Batch = ONE_PROMPT, new_tokens: int = NEW_TOKENS, **options: Any) -> Output:
    """Run `model.generate`, greedily unless the options say otherwise, past the end that the tokenizer alone names."""
    made = model.generate(
        batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, "eos_token_id": None, **options},
    )
    return Output(made.sequences, made.logits)


def decode_greedily(decoder: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The `GraphDecoder`'s likeliest tokens [rows, new_tokens] after prompts `ids` [rows, tokens], on the host."""
    chosen = [decoder.prefill(ids).argmax(-1, keepdim=True)]
    while len(chosen) < new_tokens:
        chosen.append(decoder.step(chosen[-1]).argmax(-1, keepdim=True))
    return torch.cat(chosen, 1).cpu()


def assert_same_bits(ours: Output, theirs: Output) -> None:
    """The same tokens, and the same bits in all logits: -0.0 is not 0.0 here."""
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert len(ours.logits) == len(theirs.logits)
    for step, (left, right) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert left.dtype == right.dtype
        assert torch.isfinite(right).all(), f"the reference's logits of step {step} are not numbers"
        as_int = _SAME_WIDTH_INT[left.element_size()]
        differing = int((left.contiguous().view(as_int) != right.contiguous().view(as_int)).sum())
        worst = float((left.double() - right.double()).abs().max())
        assert differing == 0, f"step {step}: {differing} of {left.numel()} logits differ, by up to {worst:.3g}"


class References:
    """transformers' own resident models and what they generate, each made once per session."""

    def __init__(self) -> None:
        self._models: dict[Any, Any] = {}
        self._outputs: dict[Any, Output] = {}

    def model(self, folder: Path, implementation: str = "eager", **options: Any) -> Any:
        """The checkpoint loaded by transformers, experts in memory."""
        from transformers import AutoModelForCausalLM

        key = (folder, implementation, tuple(sorted(options.items())))
        if key not in self._models:
            options = {"dtype": "auto", **options}
            self._models[key] = AutoModelForCausalLM.from_pretrained(
                folder, experts_implementation=implementation, **options
            ).eval()
            assert self._models[key].config._experts_implementation == implementation
        return self._models[key]

    def output(self, folder: Path, batch: Batch = ONE_PROMPT, implementation: str = "eager") -> Output:
        """What that model generates greedily after `batch`."""
        key = (folder, id(batch), implementation)
        if key not in self._outputs:
            self._outputs[key] = generate(self.model(folder, implementation), batch)
        return self._outputs[key]


def expert_table(folder: Path) -> ExpertTable:
    """Where the checkpoint's experts are; no weights are read."""
    return outline(folder, read_index(folder)).table


def slots_memory(folder: Path, num_slots: int) -> int:
    """A memory budget, in bytes, of exactly `num_slots` slots."""
    return num_slots * expert_table(folder).slot_bytes


def packed_store(folder: Path) -> Path:
    """The checkpoint's packed store, made once beside its folder (so that "auto" does not find it)."""
    path = folder.with_name(f"{folder.name}-{STORE_NAME}")
    if not path.is_file():
        pack(expert_table(folder), path, progress=lambda done, total: None)
    return path


@dataclass
class ReadSpy:
    """Files that were read by offset, and the threads that did."""

    paths: set[str] = field(default_factory=set)
    threads: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        """The files' names."""
        return {Path(path).name for path in self.paths}


@contextmanager
def watch_reads() -> Iterator[ReadSpy]:
    """Note every os.preadv inside."""
    spy, preadv = ReadSpy(), os.preadv

    def noting(fd: int, *args: Any) -> int:
        spy.paths.add(os.readlink(f"/proc/self/fd/{fd}"))
        spy.threads.add(threading.current_thread().name)
        return preadv(fd, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", noting)
        yield spy


@contextmanager
def watch_ring(model: Any) -> Iterator[list[int]]:
    """The numbers of slots that prefill borrowed inside."""
    residency, borrowed = model.foreroute.engine.pool.residency, list[int]()
    borrow = residency.borrow

    def noting(num_slots: int) -> list[int]:
        slots = borrow(num_slots)
        borrowed.append(len(slots))
        return slots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency, "borrow", noting)
        yield borrowed
