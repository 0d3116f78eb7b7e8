"""What serving takes, by made-up numbers: what is counted, and advice that works when it is followed."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.errors import BudgetError
from foreroute.memory.serving_budget import (
    ServingNeeds,
    activation_bytes,
    attention_bytes,
    check_serving,
    choose_kv_tokens,
    kept_prompt_bytes,
    logit_bytes,
)

MIB, GIB = 2**20, 2**30
NEEDS = ServingNeeds(
    dense_bytes=2 * GIB, expert_bytes=8 * GIB, kv_tokens=32768, kv_bytes_per_token=98304, working_bytes=GIB
)


def test_everything_is_counted_once() -> None:
    assert NEEDS.kv_bytes == 3 * GIB
    assert NEEDS.kept_bytes == 2 * GIB
    assert NEEDS.total_bytes == 16 * GIB
    assert replace(NEEDS, keeps_prompts=False).total_bytes == 14 * GIB
    assert kept_prompt_bytes(5 * MIB) == 5 * MIB
    assert kept_prompt_bytes(5 * MIB, 7 * GIB) == 7 * GIB, "what was asked for"
    assert kept_prompt_bytes(5 * MIB, None, MIB) == 21 * MIB, "and some states"
    assert replace(NEEDS, prefix_cache=3 * MIB).total_bytes == 14 * GIB + 3 * MIB
    assert activation_bytes(2048, 100, 2) + logit_bytes(512, 1000, 2) == 2 * (2048 * 1600 + 512 * 1000)
    each = replace(NEEDS, working_bytes_per_token=1024)
    assert each.all_working_bytes == each.total_bytes - 15 * GIB == GIB + 32 * MIB
    assert each.tokens_bytes == 5 * GIB + 32 * MIB


def test_attention_counts_what_its_kind_writes() -> None:
    """Of a chunk of 100 tokens that sees 1,000, with 4 heads of 16 numbers in float32: a token's are 256 bytes."""
    of = {kind: attention_bytes(kind, 100, 1000, 4, 16, 4, 5000) for kind in ("joined", "blocks", "masked", "written")}
    own, repeated, mask = 8 * 100 * 256, 2 * 1000 * 256, 100 * 1000 * 5
    assert of == {
        "joined": own,
        "blocks": own + repeated + 5000,
        "masked": own + repeated + mask,
        "written": own + repeated + 3 * 4 * 100 * 1000 * 4,
    }
    assert attention_bytes("joined", 100, 9000, 4, 16, 4, 5000) == own, "no mask of chunk x context"


def test_tokens_of_keys_and_values() -> None:
    assert choose_kv_tokens(None, 2048, 8) == 16384
    assert choose_kv_tokens(None, 40960, 8) == 40960, "one request alone has its whole context"
    assert choose_kv_tokens(None, 8192, 8) == 32768
    assert choose_kv_tokens(5000, 5000, 8) == 5000
    with pytest.raises(BudgetError, match=r"have 5001 tokens.*--ctx-size 5000, or --kv-tokens 5001"):
        choose_kv_tokens(5000, 5001, 8)


def test_what_does_not_fit_is_said_part_by_part() -> None:
    check_serving(NEEDS, 16 * GIB, GIB)
    with pytest.raises(BudgetError) as refused:
        check_serving(NEEDS, 16 * GIB - 1, GIB)
    said = str(refused.value)
    for part in ("16.0 GiB of RAM", "experts 8.0 GiB", "dense weights 2.0 GiB", "3.0 GiB (32768 tokens)",
                 "earlier prompts 2.0 GiB", "rest 1.0 GiB", "--memory to 8191MiB", "--kv-tokens to 32767",
                 "--prefix-cache to 2047MiB"):  # fmt: skip
        assert part in said


def test_a_step_that_is_not_enough_is_not_advised() -> None:
    def said(available: int, needs: ServingNeeds = NEEDS) -> str:
        with pytest.raises(BudgetError) as refused:
            check_serving(needs, available, GIB)
        return str(refused.value).split("tokens), ")[1]

    assert "--memory to" not in said(6 * GIB)
    assert "Lower --memory, and --kv-tokens below" in said(6 * GIB)
    assert "Lower --memory to 3072MiB." in said(11 * GIB)
    assert "close other programs" in said(3 * GIB)
    chosen = replace(NEEDS, expert_bytes=GIB)
    assert "Lower --kv-tokens to 16384" in said(7 * GIB, chosen)
    assert "--memory" not in said(7 * GIB, chosen)


@given(
    available=st.integers(0, 64 * GIB),
    kv_tokens=st.integers(16, 2**20),
    per_token=st.integers(0, 2**20),
    keeps=st.booleans(),
    experts=st.integers(GIB, 32 * GIB),
    working=st.integers(0, 2**18),
    prefix=st.none() | st.integers(0, 8 * GIB),
    states=st.sampled_from([0, 0, MIB, GIB]),
)
def test_advice_that_is_followed_is_enough(
    available, kv_tokens, per_token, keeps, experts, working, prefix, states
) -> None:
    """And one token more is not, where tokens alone would do."""
    needs = ServingNeeds(GIB, experts, kv_tokens, per_token, GIB, keeps, working, prefix, states)
    try:
        check_serving(needs, available, GIB)
        return
    except BudgetError as error:
        advice = str(error)
    if memory := re.search(r"--memory to (\d+)MiB", advice):
        check_serving(replace(needs, expert_bytes=int(memory[1]) * MIB), available, GIB)
    if kept := re.search(r"--prefix-cache to (\d+)(MiB)?", advice):
        check_serving(replace(needs, prefix_cache=int(kept[1]) * MIB), available, GIB)
    if tokens := re.search(r"--kv-tokens to (\d+)", advice):
        check_serving(replace(needs, kv_tokens=int(tokens[1])), available, GIB)
        assert replace(needs, kv_tokens=int(tokens[1]) + 1).total_bytes > available
    if both := re.search(r"--kv-tokens below (\d+)", advice):
        check_serving(replace(needs, expert_bytes=GIB, kv_tokens=int(both[1])), available, GIB)
