"""Grouped heads and fused norms with ggml's kernels: in use, near transformers' own, and off where they must be."""

from typing import Any

import pytest
import torch

from foreroute.kernels.ggml.decoder.attention import TokenAttention
from foreroute.model.decode import attention as decode_attention
from tests.formats.gguf_writer import Kind, Written, write_gguf

ARCHITECTURES = ("qwen3moe", "gpt-oss")
STEPS = 6
IDS = torch.tensor([[5, 17, 42, 99, 3, 120, 7, 8, 64, 11, 201, 35], [9, 31, 77, 14, 220, 6, 50, 2, 18, 93, 4, 160]])
PADDING = torch.ones_like(IDS)
PADDING[1, :5] = 0


@pytest.fixture(scope="module")
def written(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """In floats, whose products are not rounded: what differs comes from attention and norms."""
    return {name: write_gguf(tmp_path_factory.mktemp(name), name, Kind.F32, dense=Kind.F32) for name in ARCHITECTURES}


def attention_of(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def num_fused(model: Any) -> int:
    return sum("forward" in module.__dict__ for module in model.modules() if type(module).__name__.endswith("RMSNorm"))


def without_either(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("foreroute.loading.block_kernels.group_heads", lambda model, runner: None)
    patch.setattr("foreroute.loading.block_kernels.fuse_norms", lambda model: 0)


@torch.no_grad()
def decoded(model: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [steps, rows, vocabulary] of tokens that do not depend on the model."""
    seen = None if mask is None else mask.clone()
    out = model(IDS, attention_mask=seen, use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(STEPS):
        if seen is not None:
            seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
        given = torch.tensor([[20 + step], [40 + step]])
        out = model(given, attention_mask=seen, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ggml's attention notes each call."""
    calls: list[str] = []
    of_token = TokenAttention.__call__

    def noting_graph(*given: Any, **named: Any) -> Any:
        calls.append("ggml")
        return of_token(*given, **named)

    monkeypatch.setattr(TokenAttention, "__call__", noting_graph)
    return calls


@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_near_those_without(name: str, mask: Any, written: Any, load: Any, monkeypatch: Any) -> None:
    calls = counted(monkeypatch)
    model = load(written[name].path, "100%")
    assert model.foreroute.plan.math == "ggml"
    assert attention_of(model).startswith("foreroute_")
    assert num_fused(model) > 0
    ours = decoded(model, mask)
    assert len(calls) == STEPS * model.config.num_hidden_layers
    with monkeypatch.context() as patch:
        without_either(patch)
        plain = load(written[name].path, "100%")
    assert (num_fused(plain), attention_of(plain).startswith("foreroute_")) == (0, False)
    calls.clear()
    theirs = decoded(plain, mask)
    assert not calls
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_masks_that_weigh_tokens_are_transformers_own(written: Any, load: Any, monkeypatch: Any) -> None:
    calls, model = counted(monkeypatch), load(written["qwen3moe"].path, "100%")
    with torch.no_grad():
        out = model(IDS[1:], use_cache=True)
        weights = torch.zeros(1, 1, 1, IDS.shape[1] + 1).index_fill_(3, torch.tensor([3]), -0.5)
        given = {"attention_mask": weights, "past_key_values": out.past_key_values, "use_cache": True}
        assert model(torch.tensor([[40]]), **given).logits.isfinite().all()
    assert not calls


def test_eager_attention_that_was_asked_for_is_computed(written: Any, load: Any, monkeypatch: Any) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    calls, eager, heard = counted(monkeypatch), modeling_qwen3_moe.eager_attention_forward, list[int]()

    def noting(*given: Any, **named: Any) -> Any:
        heard.append(1)
        return eager(*given, **named)

    model = load(written["qwen3moe"].path, "100%", attn_implementation="eager")
    monkeypatch.setattr(modeling_qwen3_moe, "eager_attention_forward", noting)
    decoded(model, PADDING)
    assert attention_of(model).endswith("eager")
    assert not calls
    assert len(heard) == (STEPS + 1) * model.config.num_hidden_layers


def test_a_mask_of_each_head_is_left_to_transformers_own() -> None:
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 5, 8)

    def can_group(mask: Any) -> bool:
        return decode_attention._can_group(None, query, key, mask, {"scaling": 1.0}, "sdpa")

    assert can_group(None)
    assert can_group(torch.zeros(1, 1, 1, 5))
    assert not can_group(torch.zeros(1, 4, 1, 5))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_token_that_sees_all_has_no_mask(
    name: str, is_padded: bool, written: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of transformers' masks, in windows too; with padding, transformers' masks are made."""
    made: list[bool] = []

    def noted(make: Any) -> Any:
        def noting(**given: Any) -> Any:
            made.append(given["q_length"] == 1)
            return make(**given)

        return noting

    for own in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(decode_attention, own, noted(getattr(decode_attention, own)))
    model = load(written[name].path, "100%")
    padding = PADDING[1:] if is_padded else None

    def alone() -> torch.Tensor:
        out = model(IDS[1:], attention_mask=padding, use_cache=True)
        logits, seen = [], padding
        for step in range(20):  # beyond gpt-oss's window
            seen = None if seen is None else torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
            out = model(torch.tensor([[40 + step]]), attention_mask=seen, past_key_values=out.past_key_values)
            logits.append(out.logits[0, -1])
        return torch.stack(logits)

    with torch.no_grad():
        found = alone()
        assert any(made) == is_padded
        monkeypatch.setattr(decode_attention, "_mask", lambda own, **given: own(**given))
        again = load(written[name].path, "100%")
        monkeypatch.setattr(model, "forward", again.forward)
        assert torch.equal(alone(), found)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_padding_mask_that_ends_early_is_transformers_own(tokens: int) -> None:
    """transformers takes what it does not speak of for padding."""
    given = {
        "batch_size": 1,
        "q_length": 1,
        "kv_length": 4,
        "q_offset": 3,
        "attention_mask": torch.ones(1, tokens, dtype=torch.bool),
    }
    theirs = decode_attention.sdpa_mask(**given)
    ours = decode_attention._mask(decode_attention.sdpa_mask, **given)
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert decode_attention._mask(decode_attention.sdpa_mask, **{**given, "attention_mask": None}) is None
