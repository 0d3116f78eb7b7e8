"""Attention of prompts' chunks: what every token sees is all before it, or a window, without a mask of all that."""

from typing import Any

import pytest
import torch

from foreroute.batching import row_attention
from foreroute.batching.engine import BatchEngine
from foreroute.batching.rows import RowsCache
from foreroute.kernels.torch.chunk_attention import attend_chunk, takes
from foreroute.memory.freed import FreedMemory
from foreroute.model.decode import attention
from foreroute.model.decode.attention import attends_in_chunks, block_bytes, prompt_attention, tokens_of_block
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import ask
from tests.prefixes.conftest import TINY

PROMPTS = (list(range(5, 45)), list(range(60, 83)), [7, 9, 8])


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """As attend_chunk, from the textbook's formula in float64."""
    group, num, held = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    keys, values = (one.double().repeat_interleave(group, dim=1) for one in (key, value))
    products = query.double() @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.arange(held)[None] > torch.arange(held - num, held)[:, None]
    return (products.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "before"), [(4, 4, 300), (6, 2, 65), (4, 1, 1), (6, 2, 0)])
def test_a_chunk_sees_its_context_and_its_own_beginning(
    dtype: torch.dtype, heads: int, key_heads: int, before: int
) -> None:
    made, num = torch.Generator().manual_seed(0), 40
    query = torch.randn(2, heads, num, 16, generator=made).to(dtype)
    # As a row's: columns of a wider buffer. Some contexts weigh much more than the chunk, or much less.
    key, value = (
        torch.randn(2, key_heads, before + num + 9, 16, generator=made).mul(3).to(dtype)[:, :, 4 : before + num + 4]
        for _ in range(2)
    )
    assert takes(query, key, value)
    for scale in (None, 1.5):
        found = attend_chunk(query, key, value, scale)
        assert (found.shape, found.dtype) == ((2, num, heads, 16), dtype)
        assert found.is_contiguous()
        expected = by_definition(query, key, value, scale)
        most = 1e-4 if dtype == torch.float32 else 6e-2
        torch.testing.assert_close(found.double(), expected, atol=most, rtol=0)


def test_what_torchs_operation_does_not_know_is_left_to_others() -> None:
    query, key = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 5, 16)
    assert takes(query, key, key)
    assert not takes(query, key, key[..., :8]), "values of another size"
    assert not takes(query, key.double(), key), "of several kinds"
    assert not takes(query, key.transpose(2, 3).contiguous().transpose(2, 3), key), "columns apart"


@torch.no_grad()
def alone(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


@torch.no_grad()
def computed_in_chunks(model: Any, most: int) -> list[torch.Tensor]:
    """The last logits of each prompt, whose chunks share steps."""
    rows, done, found = RowsCache(model), [0] * len(PROMPTS), {}
    rows.arrange([], [(None, 0)] * len(PROMPTS))
    going = list(range(len(PROMPTS)))
    while going:
        chunks = [PROMPTS[at][done[at] : done[at] + most] for at in going]
        logits = rows.step(chunks, "prefill")[:, -1].float()
        for place, at in enumerate(going):
            done[at] += len(chunks[place])
            found[at] = logits[place]
        left = [place for place, at in enumerate(going) if done[at] < len(PROMPTS[at])]
        rows.arrange(left, [])
        going = [going[place] for place in left]
    return [found[at] for at in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen3_moe", "joined"), ("deepseek_v3", "blocks"), ("gpt_oss", "blocks")]
)
def test_chunks_say_what_a_prompt_says_at_once(
    checkpoints: Any, load: Any, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    """Of several rows in company, in blocks of few tokens; and no mask is made for them."""
    model = load(checkpoints.get(family), "100%")
    assert prompt_attention(model) == kind
    expected = [alone(model, ids) for ids in PROMPTS]
    monkeypatch.setattr(attention, "BLOCK_BYTES", 0)
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 5)
    masks, own = [], row_attention._attend

    def noted(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return own(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(row_attention, "_attend", noted)
    for logits, wanted in zip(computed_in_chunks(model, 11), expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    assert masks
    assert not any(mask is not None for mask in masks)


def test_blocks_keep_products_within_their_bytes(checkpoints: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoints.get("deepseek_v3"), "100%")
    heads = model.config.num_attention_heads
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 1)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 4 * heads * 40 * 6)
    sizes, own = [], row_attention.function_of

    def noting(module: Any, name: str) -> Any:
        def attend(module: Any, query: Any, key: Any, *others: Any, **kwargs: Any) -> Any:
            sizes.append(query.shape[1] * query.shape[2] * key.shape[2])
            return own(module, name)(module, query, key, *others, **kwargs)

        return attend

    monkeypatch.setattr(row_attention, "function_of", noting)
    computed_in_chunks(model, 40)
    assert 0 < max(sizes) <= heads * 40 * 6
    # What the plan counts, also where the context is so long that the fewest tokens of a block take more.
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 16)
    assert block_bytes(heads, 40) == 4 * 4 * heads * 40 * 16
    assert tokens_of_block(heads, 40) == 16
    assert block_bytes(heads, 4) == 4 * 4 * heads * 40 * 6


def test_attention_of_other_kinds_stays_the_familys(
    checkpoints: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoints.get("qwen3_moe"), "100%")
    assert attends_in_chunks(model)
    monkeypatch.setattr(attention, "_calls_interface", lambda module: True)
    assert not attends_in_chunks(model), "something else attends too"
    assert prompt_attention(model) == "masked"
    assert RowsCache(model)._chunks is None
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    assert prompt_attention(model) == "written"


def test_freed_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, trimmed = [100.0], []
    monkeypatch.setattr("foreroute.memory.freed.time.monotonic", lambda: now[0])
    monkeypatch.setattr("foreroute.memory.freed.give_back_freed", lambda: trimmed.append(now[0]))
    freed = FreedMemory()
    for now[0] in (100.5, 102.5, 103.0, 104.4, 104.6):
        freed.give_back(is_idle=False)
    freed.give_back(is_idle=True)
    assert trimmed == [102.5, 104.6, 104.6]


def test_the_engine_gives_freed_memory_back(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[FreedMemory, bool]] = []
    monkeypatch.setattr(FreedMemory, "give_back", lambda self, *, is_idle: given.append((self, is_idle)))
    model = load(TINY, "50%")
    engine = BatchEngine(model, load_tokenizer(TINY), 128)
    try:
        ask(engine, [5, 6, 7], 3).wait()
    finally:
        engine.close()
    # The step of the prompt and those of two tokens; one more, after which it ends, may not be waited for.
    assert len(given) >= 2
    assert len({id(one) for one, _ in given}) == 1
    assert [is_idle for _, is_idle in given][-1], "nothing is left to do"
    assert not given[0][1]
