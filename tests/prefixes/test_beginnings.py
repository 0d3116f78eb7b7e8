"""What several requests begin with is computed once: at once, in turn, and with other ends."""

from typing import Any

import torch

from foreroute.batching.answer import Answer
from foreroute.batching.beginnings import Beginnings
from foreroute.batching.requests import PromptProgress, Request
from foreroute.batching.rows import RowsCache
from foreroute.engine.interfaces import StepInfo
from foreroute.generation.prefix_cache import PromptCache
from foreroute.memory.serving import serving_needs
from foreroute.model.caches import cache_argument, cache_of, new_cache
from tests.batching.test_engine import GREEDY, Heard, ask, assert_same_answers

SYSTEM = 80


def kind(model: Any) -> str:
    return str(model.config.model_type)


def ids_of(model: Any, num: int, seed: int) -> list[int]:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def computed(model: Any, do: Any) -> tuple[Any, int]:
    """What `do` returns, and how many prompt tokens were computed meanwhile."""
    before = model.foreroute.stats()
    done = do()
    return done, model.foreroute.stats().minus(before).prefill.tokens


@torch.no_grad()
def logprobs_of_pieces(model: Any, pieces: list[list[int]]) -> torch.Tensor:
    """[vocabulary]: what follows these tokens, computed piece by piece with nothing reused."""
    rows = RowsCache(model)
    rows.arrange([], [(None, 0)])
    for piece in pieces:
        logits = rows.step([piece], "decode" if len(piece) == 1 else "prefill")
    return torch.log_softmax(logits[0, -1].float(), dim=-1)


@torch.no_grad()
def transformers_logprobs(model: Any, pieces: list[list[int]]) -> torch.Tensor:
    """The same in a cache of transformers' own, with its attention."""
    cache = new_cache(model)
    for at, piece in enumerate(pieces):
        ids = torch.tensor([piece])
        with model.foreroute.step(StepInfo.of("prefill", ids, is_start=at == 0)):
            out = model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        cache = cache_of(out)
    return torch.log_softmax(out.logits[0, -1].float(), dim=-1)


def test_conversations_in_turn_compute_nothing_twice(model, engine_of) -> None:
    """Each prompt is what was said, and more; what was said before it is not computed again."""
    engine, system = engine_of(model, max_num_seqs=2), ids_of(model, SYSTEM, 1)
    texts = [[*system, *ids_of(model, 7, 10 + at)] for at in range(2)]
    lengths = [0, 0 if kind(model) == "qwen3_next" else SYSTEM]
    for turn in range(3):
        for at, ids in enumerate(texts):
            heard, num_computed = computed(model, lambda ids=ids: ask(engine, ids, 4).wait())
            assert heard.end.cached_tokens == len(ids) - num_computed == lengths[at]
            # The last token was chosen and not computed.
            lengths[at] = len(ids) + 3
            ids += [*heard.tokens, *ids_of(model, 5, 20 + 2 * turn + at)]


def test_bits_are_those_of_the_same_chunks_without_reuse(model, engine_of) -> None:
    engine, system = engine_of(model, max_num_seqs=2), ids_of(model, SYSTEM, 1)
    first = ask(engine, system, 4).wait()
    following = [*system, *first.tokens, *ids_of(model, 6, 3)]
    again = ask(engine, following, 1).wait()
    reused = again.end.cached_tokens
    assert reused == SYSTEM + 3
    pieces = [system, *([token] for token in first.tokens[:3]), following[reused:]]
    expected = logprobs_of_pieces(model, pieces)
    step = again.steps[0]
    assert step.logprob == expected[step.token_id].item()
    torch.testing.assert_close(expected, transformers_logprobs(model, pieces), atol=1e-4, rtol=0)


def test_a_cold_beginning_that_several_have_is_computed_once(model, engine_of) -> None:
    engine, system = engine_of(model, max_num_seqs=4), ids_of(model, SYSTEM, 1)
    texts = [[*system, *ids_of(model, 5, 30 + at)] for at in range(4)]

    def all_at_once() -> list[Heard]:
        return [one.wait() for one in [ask(engine, ids, 4) for ids in texts]]

    heard, num_computed = computed(model, all_at_once)
    assert num_computed == SYSTEM + 4 * 5
    for one, ids in zip(heard, texts, strict=True):
        alone = ask(engine_of(model, max_num_seqs=1), ids, 4).wait()
        assert one.tokens == alone.tokens
        assert alone.end.cached_tokens == 0


def test_of_equal_prompts_one_is_computed(model, engine_of) -> None:
    engine, ids = engine_of(model, max_num_seqs=4), ids_of(model, SYSTEM, 1)
    heard, num_computed = computed(model, lambda: [one.wait() for one in [ask(engine, ids, 4) for _ in range(4)]])
    assert num_computed == SYSTEM + 3
    assert {tuple(one.tokens) for one in heard} == {tuple(heard[0].tokens)}
    assert sorted(one.end.cached_tokens for one in heard) == [0, *[SYSTEM - 1] * 3]


def test_who_waited_for_a_prompt_that_is_cancelled_computes_it(model, engine_of) -> None:
    engine, ids = engine_of(model, max_num_seqs=4), ids_of(model, SYSTEM, 1)
    first, second = Heard(), Heard()

    def leave(event: Any) -> None:
        first(event)
        if isinstance(event, PromptProgress):
            raise OSError("the client has left")

    engine.submit(Request(ids, 4, GREEDY, ignore_eos=True), leave)
    engine.submit(Request([*ids, 5, 6], 4, GREEDY, ignore_eos=True), second)
    assert first.wait().end.reason == "cancelled"
    assert second.wait().end.reason == "length"


def test_another_end_reuses_what_is_before_it(model, engine_of) -> None:
    """At once where a model continues anywhere; where a state is needed, from the second such prompt on."""
    engine, system = engine_of(model, max_num_seqs=1), ids_of(model, SYSTEM, 1)
    reused = []
    for at in range(3):
        ids = [*system, *ids_of(model, 30, 40 + at)]
        reused.append(ask(engine, ids, 4).wait().end.cached_tokens)
    assert reused == [0, SYSTEM if kind(model) == "qwen3_moe" else 0, SYSTEM]


def test_a_template_that_ends_otherwise_next_time_loses_little(model, engine_of) -> None:
    """A prompt's last tokens (an opened thought) are not in the next prompt: all before them is reused."""
    engine, system = engine_of(model, max_num_seqs=1), ids_of(model, SYSTEM, 1)
    ask(engine, [*system, 7, 8, 9], 4).wait()
    again = ask(engine, [*system, 7, *ids_of(model, 12, 2)], 4).wait()
    assert again.end.cached_tokens == (0 if kind(model) == "qwen3_next" else SYSTEM + 1)


def test_memory_of_what_is_kept_is_as_asked(checkpoints, load, engine_of) -> None:
    model = load(checkpoints.get("qwen3_moe"), "50%", prefix_cache="20KiB")
    engine = engine_of(model, max_num_seqs=2)
    for at in range(12):
        ask(engine, ids_of(model, 20, at), 4).wait()
        assert engine.state().prefix_bytes <= 20 * 2**10
    assert engine.state().prefix_bytes > 10 * 2**10
    none = load(checkpoints.get("qwen3_moe"), "50%", prefix_cache=0)
    engine, ids = engine_of(none, max_num_seqs=2), ids_of(none, 40, 1)
    assert [ask(engine, ids, 2).wait().end.cached_tokens for _ in range(2)] == [0, 0]
    assert engine.state().prefix_bytes == 0


def test_what_was_of_use_is_counted(model, engine_of) -> None:
    engine, ids = engine_of(model, max_num_seqs=1), ids_of(model, SYSTEM, 1)
    for _ in range(3):
        ask(engine, ids, 2).wait()
    state = engine.state()
    # Where a state is needed, the second prompt leaves it before its last token.
    hits = 1 if kind(model) == "qwen3_next" else 2
    assert (state.prefix_lookups, state.prefix_hits, state.prefix_tokens) == (3, hits, hits * (SYSTEM - 1))


def test_rows_of_a_hybrid_share_steps_and_say_what_each_says_alone(hybrid, load, engine_of) -> None:
    model = load(hybrid, "50%")
    engine = engine_of(model, max_num_seqs=4)
    assert (engine.rows, engine.why_one_row) == (4, "")
    texts = [ids_of(model, num, num) for num in (9, 40, 3, 25)]
    alone = [ask(engine_of(model, max_num_seqs=1), ids, 12).wait() for ids in texts]
    before = model.foreroute.stats()
    together = [one.wait() for one in [ask(engine, ids, 12) for ids in texts]]
    done = model.foreroute.stats().minus(before)
    assert done.decode.steps < done.decode.tokens, "steps were not shared"
    for one, other in zip(alone, together, strict=True):
        assert_same_answers(one, other)


def test_states_are_in_the_plan(hybrid, load) -> None:
    """As transformers holds them, for the rows that run and for some that are kept."""
    model = load(hybrid, "100%", kv_tokens=64)
    handle = model.foreroute
    with torch.no_grad():
        layers = cache_of(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)).layers
    held = [*(one.conv_states[0] for one in layers if hasattr(one, "conv_states")),
            *(one.recurrent_states[0] for one in layers if hasattr(one, "conv_states"))]  # fmt: skip
    needs = serving_needs(model, handle.plan, handle.layers, handle.host_engine.pool.residency, 64)
    assert needs.state_bytes == sum(one.nbytes for one in held) > 0
    assert needs.kept_bytes == needs.kv_bytes + 16 * needs.state_bytes


def test_answers_that_ended_refer_to_no_other(model, engine_of, monkeypatch) -> None:
    """One waits while another is in prefill, again and again: a chain of references would hold all of them."""
    waited: list[Answer] = []
    own = Beginnings.is_computed_by

    def noted(self: Beginnings, others: Any, answer: Answer) -> bool:
        found = own(self, others, answer)
        if answer.shared:
            waited.append(answer)
        return found

    monkeypatch.setattr(Beginnings, "is_computed_by", noted)
    engine, ids = engine_of(model, max_num_seqs=4), ids_of(model, SYSTEM, 1)
    for one in [ask(engine, [*ids, 5 + at], 4) for at in range(4)]:
        one.wait()
    assert waited
    assert [answer for answer in waited if answer.shared] == []


def test_nobody_waits_for_a_prompt_that_is_too_long_to_be_kept(checkpoints, load) -> None:
    model = load(checkpoints.get("qwen3_moe"), "50%")
    kept, ids = Beginnings(model, max_bytes=60 * 512, bytes_per_token=512), ids_of(model, 61, 1)
    waiting = Answer(Request([*ids[:40], 5], 4), print, 4)
    assert kept.is_computed_by([Answer(Request(ids[:40], 4), print, 4)], waiting)
    assert not kept.is_computed_by([Answer(Request(ids, 4), print, 4)], waiting), "all of it would be kept, or nothing"


def test_what_is_kept_of_a_prompt_that_waits_is_looked_up_once(checkpoints, load, engine_of, monkeypatch) -> None:
    model, lookups = load(checkpoints.get("qwen3_moe"), "50%"), []
    engine, ids = engine_of(model, max_num_seqs=2), ids_of(model, 60, 1)
    own = PromptCache.reusable
    monkeypatch.setattr(PromptCache, "reusable", lambda *args: lookups.append(1) or own(*args))
    others, waiting = [Answer(Request(ids[: 50 + at], 4), print, 4) for at in range(4)], Answer(Request(ids), print, 4)
    for _ in range(5):
        assert engine._kept.is_computed_by(others, waiting)
    assert len(lookups) == 1
    ask(engine, ids[:55], 1).wait()
    assert not engine._kept.is_computed_by(others, waiting), "what is kept has changed"
