"""The synthetic checkpoint is one: transformers loads and runs it, and the same options give the same bytes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import make_synthetic

TINY = "--layers 2 --experts 4 --top-k 2 --hidden 32 --intermediate 16 --heads 4 --kv-heads 2 --head-dim 8 --vocab 512"


def write(out: Path, *more: str) -> Path:
    return make_synthetic.write_checkpoint(make_synthetic.parse_args(["--out", str(out), *TINY.split(), *more]))


def digest(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()


def test_transformers_runs_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "synth")
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    text = "A road, and it's 12 miles: größe."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    logits = model(ids).logits.float()
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 3  # neither one token for all nor a coin toss between all


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "first")
    assert digest(write(tmp_path / "same")) == digest(first)
    assert digest(write(tmp_path / "other", "--seed", "1")) != digest(first)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_synthetic, "SHARD_BYTES", 20_000)
    whole = write(tmp_path / "whole")
    write_shard, written = make_synthetic.write_shard, []

    def breaks_at_the_third(path: Path, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, *rest)

    monkeypatch.setattr(make_synthetic, "write_shard", breaks_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "synth")
    assert not (tmp_path / "synth").exists()

    again: list[str] = []
    monkeypatch.setattr(
        make_synthetic, "write_shard", lambda path, *rest: (again.append(path.name), write_shard(path, *rest))
    )
    assert digest(write(tmp_path / "synth")) == digest(whole)
    assert again
    assert not set(again) & set(written)


def test_the_attention_gain_scales_what_attention_adds_and_nothing_else(tmp_path: Path) -> None:
    plain, gentle = write(tmp_path / "plain"), write(tmp_path / "gentle", "--attention-gain", "0.5")
    (first,), (second,) = (
        [load_file(path) for path in sorted(folder.glob("*.safetensors"))] for folder in (plain, gentle)
    )
    for name, weight in first.items():
        scale = 0.5 if name.endswith("self_attn.o_proj.weight") else 1
        assert torch.equal(second[name], weight * scale), name
