"""A draft changes how soon tokens come, and not which ones."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.drafting import steps
from foreroute.drafting.steps import DraftedSteps
from foreroute.engine.interfaces import StepInfo, StepObserver
from foreroute.errors import ReadError
from foreroute.generation.prefix_cache import PromptCache
from foreroute.model.caches import cache_argument, new_cache
from foreroute.model.decode.positions import PositionsAlike, can_attend_by_position
from tests.drafting.conftest import Compared

SHIPPED = Path(__file__).parents[2] / "models"
TRAINED = ("foreroute-tiny", "foreroute-tiny-oss", "foreroute-tiny-dsv3")
PROMPT = [10, 20, 30, 40, 50, 60, 70]
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    ("family", "dtype"),
    # Where rows are alike; in float32 their last bits differ, and tokens would in a tie alone.
    [("qwen3_moe", "bfloat16"), ("gpt_oss", "bfloat16"), ("gpt_oss", "float32"), ("deepseek_v3", "float32")],
)
def test_the_tokens_are_those_without_a_draft(checkpoints, compared: Callable[..., Compared], family, dtype) -> None:
    """Likeliest or sampled, experts evicted, windows that slide, and drafts that are wrong in places."""
    made = compared(checkpoints.get(family), dtype=dtype)
    for options in ({}, SAMPLED, {"repetition_penalty": 1.3}):
        without, drafted = made.both(PROMPT, **options)
        assert drafted.token_ids == without.token_ids
        assert 0 < drafted.accepted < drafted.drafted
        assert drafted.stats.answers.steps < without.stats.answers.steps
    assert made.model.foreroute.stats().evictions > 0


@pytest.mark.parametrize("memory", ["25%", "100%"])
@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_say_the_same(compared: Callable[..., Compared], name: str, memory: str) -> None:
    made = compared(SHIPPED / name, memory)
    without, drafted = made.both([*range(300, 340)], count=40)
    assert drafted.token_ids == without.token_ids
    assert 0 < drafted.accepted < drafted.drafted


@pytest.mark.parametrize("name", TRAINED)
def test_a_verified_token_has_the_bits_of_a_decoded_one(load, name: str) -> None:
    """As products of several rows have those of one in bf16 at these sizes; docs/limitations.md."""
    model = load(SHIPPED / name, "100%")
    assert can_attend_by_position(model)
    positions = PositionsAlike(model, [layer.router.module for layer in model.foreroute.layers])
    torch.manual_seed(0)
    ids = torch.randint(300, 4000, (1, 152))

    def logits(chunks: Sequence[torch.Tensor], phase: Any) -> torch.Tensor:
        cache, rows = new_cache(model), []
        model(ids[:, :140], **cache_argument(cache))
        for chunk in chunks:
            alike = positions.running() if phase == "verify" else nullcontext()
            with model.foreroute.step(StepInfo.of(phase, chunk)), alike:
                rows.append(model(chunk, **cache_argument(cache)).logits[0])
        return torch.cat(rows)

    alone = logits(ids[:, 140:].split(1, 1), "decode")
    together = logits(ids[:, 140:].split(6, 1), "verify")
    assert torch.equal(together, alone)


def test_one_token_too_many_is_seen(checkpoints, compared: Callable[..., Compared], monkeypatch) -> None:
    """A planted fault: what was drafted counts as chosen, whatever the model chose."""
    made = compared(checkpoints.get("qwen3_moe"))
    without, _ = made.both(PROMPT)
    own = DraftedSteps.after

    def after(self: DraftedSteps, token: int) -> torch.Tensor:
        if self._rows is not None and self._chosen < len(self._drafted):
            self._drafted[self._chosen] = token
        return own(self, token)

    monkeypatch.setattr(DraftedSteps, "after", after)
    assert made.answer(PROMPT, "prompt-lookup").token_ids != without.token_ids


def test_a_wrong_position_is_seen(checkpoints, compared: Callable[..., Compared], monkeypatch) -> None:
    """A planted fault: one token less is taken back, so that all later ones stand a place too far."""
    made = compared(checkpoints.get("qwen3_moe"))
    without, _ = made.both(PROMPT)
    own = steps.Rewind.drop
    monkeypatch.setattr(steps.Rewind, "drop", lambda self, count, num: own(self, max(count - 1, 0), num))
    assert made.answer(PROMPT, "prompt-lookup").token_ids != without.token_ids


def test_a_verify_step_is_a_phase_of_its_own(checkpoints, compared: Callable[..., Compared]) -> None:
    """Neither a prompt nor a decoded token to counts and observers; an expert of several tokens is read once."""

    class Watch(StepObserver):
        def __init__(self) -> None:
            self.steps: list[StepInfo] = []
            self.demanded: list[list[int]] = []

        def begin_step(self, info: StepInfo) -> None:
            self.steps.append(info)

        def looked_up(self, hits: Sequence[int], in_flight: Sequence[int], misses: Sequence[int]) -> None:
            if self.steps[-1].phase == "verify":
                self.demanded.append([*hits, *in_flight, *misses])

    made, watch = compared(checkpoints.get("qwen3_moe")), Watch()
    made.model.foreroute.engine.pool.add_observer(watch)
    _, drafted = made.both(PROMPT)
    stats = drafted.stats
    assert stats.prefill.steps == 1
    assert stats.verify.steps == drafted.verify_steps > 0
    assert stats.verify.tokens == drafted.verify_steps + drafted.drafted
    assert stats.decode.tokens + drafted.verify_steps + drafted.accepted == len(drafted.token_ids) - 1
    assert stats.verify.layers == 3 * drafted.verify_steps
    assert all(len(keys) == len(set(keys)) for keys in watch.demanded)
    dropped = [info.num_dropped for info in watch.steps]
    assert sum(dropped) == drafted.drafted - drafted.accepted
    assert drafted.figures()["tokens_per_step"] == (len(drafted.token_ids) - 1) / stats.answers.steps


def test_an_answer_ends_where_it_would(checkpoints, compared: Callable[..., Compared]) -> None:
    """Within what is verified too: at an end token, and at the limit."""
    made = compared(checkpoints.get("qwen3_moe"))
    without, _ = made.both(PROMPT)
    end = without.token_ids[20]
    for options in ({"eos_token_id": end}, {"count": 11}, {"count": 1}):
        plain = made.answer(PROMPT, None, **options)
        drafted = made.answer(PROMPT, "prompt-lookup", **options)
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)


@pytest.mark.parametrize("what", [KeyboardInterrupt, ReadError])
def test_a_verify_step_that_breaks_off_leaves_the_model_whole(
    checkpoints, compared: Callable[..., Compared], what: type[BaseException]
) -> None:
    """Ctrl-C, or a failing disk, amid the experts of several tokens: the next answers are as before."""
    made = compared(checkpoints.get("qwen3_moe"))
    without, _ = made.both(PROMPT)
    engine, attention = made.model.foreroute.engine, made.model.config._attn_implementation
    broken: list[int] = []

    def breaks(layer: int, hidden: torch.Tensor, *rest: Any) -> None:
        if len(hidden) > 1 and not engine.is_prefill and layer == 1 and not broken:
            broken.append(len(hidden))
            raise what("planted")

    engine.routing_listener = breaks
    if what is KeyboardInterrupt:
        report = made.answer(PROMPT, "prompt-lookup")
        assert report.finish_reason == "interrupted"
        assert report.token_ids == without.token_ids[: len(report.token_ids)]
    else:
        with pytest.raises(what, match="planted"):
            made.answer(PROMPT, "prompt-lookup")
    engine.routing_listener = None
    assert broken
    assert made.model.config._attn_implementation == attention
    assert made.answer(PROMPT, None).token_ids == without.token_ids
    assert made.answer(PROMPT, "prompt-lookup").token_ids == without.token_ids


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_was_drafted_is_no_part_of_what_is_kept(checkpoints, compared: Callable[..., Compared], family) -> None:
    """The next prompt continues the text, not what the model did not choose."""
    made = compared(checkpoints.get(family), dtype="bfloat16")
    made.both(PROMPT)
    texts = []
    for draft in (None, "prompt-lookup"):
        kept = PromptCache()
        first = made.answer(PROMPT, draft, reuse=kept)
        again = made.answer([*PROMPT, *first.token_ids, 5, 6, 7], None, reuse=kept)
        assert again.prompt_tokens_reused > len(PROMPT)
        texts.append(again.token_ids)
    assert texts[0] == texts[1]


def test_transformers_own_assisted_loop_says_the_same(checkpoints, load) -> None:
    """Its steps are not declared: several tokens behind others are a part of a prompt, with the bits of one."""
    model = load(checkpoints.get("qwen3_moe"))
    ids = torch.tensor([PROMPT * 3])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    before = model.foreroute.stats()
    assisted = model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert assisted.tolist() == plain.tolist()
    steps = model.foreroute.stats().minus(before)
    assert steps.verify.steps == 0
    assert steps.prefill.steps > 1
