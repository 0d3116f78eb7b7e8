"""llama.cpp's answers from the converter's files, recorded by tests/converted/convert.py, are those found here."""

import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foreroute
from foreroute import EngineConfig
from foreroute.model.caches import cache_argument, cache_of
from tests.converted.convert import CONVERTED, DIFFERS, prompts
from tests.converted.copies import recorded, write_q8_0
from tests.converted.models import TINY

ALIKE = [name for name in TINY if name not in DIFFERS]
# llama.cpp multiplies keys' and values' halves of kv_b one after the other, each rounded to 8 bits; here it is one
# matrix of floats. Both are as far from the numbers of F32. It looks up GELU in a table of float16: of Gemma's dense
# layers, which the family's code computes here, all tokens are the same if that is rounded so, too.
ROUNDED_OTHERWISE = {"deepseek3": 0.9, "gemma4": 0.97}
# Which tokens are attended to is a choice, too, and roundings of Q8_0 make another.
CHOSEN_BY_ROUNDING = {"glm-dsa": 0.75}
# Of the 25 prompts, those that are decoded here token by token. Of all 2,000 tokens 99.7 % or more were the same:
# python -m tests.converted.test_beside_llama_cpp.
NUM_DECODED = 5


@pytest.mark.parametrize("name", ALIKE)
def test_prompts_in_f32_end_in_llama_cpps_likeliest_tokens(
    name: str, converted: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model = load(converted(name), "60%", dtype="float32", math="torch")
    with torch.no_grad():
        found = [model(input_ids=torch.from_numpy(prompt)[None]).logits[0].argmax(-1) for prompt in prompts()[:8]]
    assert (torch.stack(found).numpy() == recorded(name)["f32"][:8]).mean() > 0.998


def _agreement(name: str, path: Path, load: Callable[..., Any], num_prompts: int) -> float:
    """The share of tokens of the first prompts after which the file's likeliest next one is llama.cpp's."""
    model = load(path, "60%", config=EngineConfig(math="ggml"))
    found = []
    for prompt in prompts()[:num_prompts]:
        tokens, past, row = torch.from_numpy(prompt)[None], None, []
        for at in range(tokens.shape[1]):
            with torch.no_grad():
                out = model(input_ids=tokens[:, at : at + 1], use_cache=True, **cache_argument(past))
            past = cache_of(out)
            row.append(int(out.logits[0, -1].argmax()))
        found.append(row)
    return float((np.array(found) == recorded(name)["q8_0"][:num_prompts]).mean())


@pytest.mark.parametrize("name", ALIKE)
def test_q8_0_decodes_to_llama_cpps_likeliest_tokens(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Most logits are the same to the last bit: a route that is as good as another makes what differs."""
    write_q8_0(name, converted(name), tmp_path / "q8_0.gguf")
    same = _agreement(name, tmp_path / "q8_0.gguf", foreroute.load, NUM_DECODED)
    assert same > ROUNDED_OTHERWISE.get(name, 0.985)


@pytest.mark.parametrize("name", DIFFERS)
def test_what_llama_cpp_computes_otherwise_is_read_all_the_same(
    name: str, converted: Callable[[str], Path], tmp_path: Path, load: Callable[..., Any]
) -> None:
    """In Q8_0, by both kinds of math, near to what F32 gives; its own test holds that to transformers' model."""
    path = tmp_path / "q8_0.gguf"
    write_q8_0(name, converted(name), path)
    tokens = torch.from_numpy(prompts()[0])[None]
    with torch.no_grad():
        expected = load(converted(name), "60%", dtype="float32", math="torch")(input_ids=tokens).logits[0]
        for math in ("torch", "ggml"):
            found = load(path, "60%", dtype="float32", math=math)(input_ids=tokens).logits[0]
            assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > CHOSEN_BY_ROUNDING.get(name, 0.85)


@pytest.mark.parametrize(("name", "is_ours"), [("glm-dsa", False), ("mixtral", True)])
def test_attention_is_not_renamed_where_the_family_goes_by_its_name(
    name: str, is_ours: bool, converted: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    """Sparse attention hides tokens under the names that it knows; under ours it would attend to all."""
    config = load(converted(name), "60%", math="ggml").config
    assert config._attn_implementation.startswith("foreroute_") == is_ours


if __name__ == "__main__":  # of all 2,000 tokens, which takes minutes
    for one in ALIKE:
        with tempfile.TemporaryDirectory() as folder:
            plain, quantised = Path(folder) / "f32.gguf", Path(folder) / "q8_0.gguf"
            plain.write_bytes(lzma.decompress((CONVERTED / f"{one}.gguf.xz").read_bytes()))
            write_q8_0(one, plain, quantised)
            print(f"{one}: {_agreement(one, quantised, foreroute.load, 25):.4f}", flush=True)
