"""Threads that use one model take turns: whatever they call, each has what it has alone, and nothing hangs."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.errors import RefusedError
from foreroute.generation.generate import generate, stream
from foreroute.model.caches import cache_argument, cache_of
from foreroute.model.text import load_tokenizer
from tests.support.conversations import Words
from tests.support.runs import make_batch

WAIT_S = 120
NEW_TOKENS = 8
ROUNDS = 12
# All of them, whatever they are.
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}


class Held:
    """A streamer that stops generate() at its first token until it may go on."""

    def __init__(self) -> None:
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.is_inside.set()
        assert self.may_go_on.wait(WAIT_S)

    def end(self) -> None:
        pass


class Thread(threading.Thread):
    """One whose result, or error, is there when it has ended."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work, self._result, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001  raised again by `result`
            self.error = error

    def result(self) -> Any:
        self.join(WAIT_S)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self._result


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints.get("qwen3_moe")


@pytest.fixture(scope="module")
def model(folder):
    import foreroute

    made = foreroute.load(folder, "30%", config=foreroute.EngineConfig(packed="no"))
    yield made
    made.foreroute.close()


def prompt(seed: int) -> torch.Tensor:
    return make_batch(8 + seed, seed=seed).ids


def answer(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    options = {"attention_mask": torch.ones_like(ids), **GREEDY, **options}
    made: list[int] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return made


def streamed(model: Any, ids: torch.Tensor) -> list[int]:
    pieces = stream(model, Words(), ids, **GREEDY)
    return [ord(one) - 0x4E00 for piece in pieces for one in piece]


def by_hand(model: Any, ids: torch.Tensor) -> list[int]:
    """Each step of its own: others come between."""
    cache, tokens, step = None, [], ids
    for _ in range(NEW_TOKENS):
        output = model(step, use_cache=True, **cache_argument(cache))
        cache, step = cache_of(output), output.logits[:, -1:].argmax(-1)
        tokens.append(int(step))
    return tokens


def with_an_iterator(model: Any, ids: torch.Tensor) -> list[int]:
    words = Words()
    streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=WAIT_S)
    made = Thread(lambda: answer(model, ids, streamer=streamer))
    text = "".join(streamer)
    model.foreroute.stats()
    assert [ord(one) - 0x4E00 for one in text] == made.result()
    return made.result()


WAYS = [
    answer,
    by_hand,
    streamed,
    lambda model, ids: list(generate(model, Words(), ids, **GREEDY).token_ids),
    with_an_iterator,
]


@pytest.mark.parametrize("num_threads", [2, 8])
def test_each_says_what_it_says_alone(model, num_threads):
    alone = [answer(model, prompt(seed)) for seed in range(num_threads)]

    def work(seed: int) -> list[list[int]]:
        return [WAYS[(seed + turn) % len(WAYS)](model, prompt(seed)) for turn in range(len(WAYS) + 1)]

    threads = [Thread(lambda seed=seed: work(seed)) for seed in range(num_threads)]
    for thread, expected in zip(threads, alone, strict=True):
        for found in thread.result():
            assert found == expected
    assert model.foreroute.stats().evictions > 0


def test_the_stack_and_lone_layers_take_turns_too(model):
    hidden = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(1))

    def states() -> list[torch.Tensor]:
        with torch.no_grad():
            layers = [layer.mlp(one[None]) for one in hidden for layer in model.model.layers]
        return [model.model(prompt(3)).last_hidden_state, *layers]

    expected, tokens = states(), answer(model, prompt(1))
    threads = [Thread(states) for _ in range(3)]
    talking = [Thread(lambda: answer(model, prompt(1))) for _ in range(2)]
    for thread in threads:
        for found, one in zip(thread.result(), expected, strict=True):
            assert torch.equal(found, one)
    assert [thread.result() for thread in talking] == [tokens] * 2


def test_a_batch_and_others_take_turns(model, folder):
    alone = answer(model, prompt(2))
    engine = BatchEngine(model, load_tokenizer(folder), 128, max_num_seqs=4)
    try:
        heard: list[list[Any]] = [[] for _ in range(8)]
        over = [threading.Event() for _ in heard]

        def listen(at: int, event: Any) -> None:
            heard[at].append(event)
            if isinstance(event, Finished):
                over[at].set()

        ask = Request(prompt(2)[0].tolist(), NEW_TOKENS, Sampling(temperature=0.0), ignore_eos=True)
        for at in range(8):
            engine.submit(ask, lambda event, at=at: listen(at, event))
        others = [Thread(lambda: answer(model, prompt(4))) for _ in range(4)]
        assert all(one.wait(WAIT_S) for one in over)
        assert len({tuple(thread.result()) for thread in others}) == 1
        for events in heard:
            assert [event.token_id for event in events if isinstance(event, NewToken)] == alone
    finally:
        engine.close()


def test_two_models_may_be_each_others_assistants(model, load, folder):
    other = load(folder, "30%")
    alone = answer(model, prompt(5))
    threads = [
        Thread(lambda one=one, two=two: [answer(one, prompt(5), assistant_model=two) for _ in range(3)])
        for one, two in [(model, other), (other, model)] * 2
    ]
    assert [thread.result() for thread in threads] == [[alone] * 3] * 4


def test_figures_do_not_wait_and_settings_do(model, folder):
    held = Held()
    talking = Thread(lambda: answer(model, prompt(6), streamer=held))
    assert held.is_inside.wait(WAIT_S)
    before = model.foreroute.stats()
    assert model.foreroute.stats().as_dict() == before.as_dict()
    asking = Thread(lambda: model.foreroute.set_policy("exact"))
    asking.join(0.05)
    assert asking.is_alive(), "the policy changed in the middle of another's answer"
    held.may_go_on.set()
    asking.result()
    assert len(talking.result()) == NEW_TOKENS


@pytest.mark.parametrize("also", [False, True], ids=["one", "two"])
def test_close_waits_for_who_generates(load, folder, also):
    mine, held = load(folder, "30%"), Held()
    alone = answer(mine, prompt(6))
    talking = Thread(lambda: answer(mine, prompt(6), streamer=held))
    assert held.is_inside.wait(WAIT_S)
    closing = [Thread(mine.foreroute.close) for _ in range(1 + also)]
    late = Thread(lambda: (closing[0].join(WAIT_S), answer(mine, prompt(6))))
    closing[0].join(0.05)
    assert closing[0].is_alive()
    held.may_go_on.set()
    assert talking.result() == alone
    for thread in closing:
        thread.result()
    with pytest.raises(RefusedError, match="closed"):
        late.result()


def test_what_a_callback_asks_is_answered(model):
    ids, asked = prompt(7), []

    def callback(piece: str) -> None:
        asked.append((model.foreroute.stats().decode.steps, by_hand(model, prompt(1))[0]))

    expected, alone = by_hand(model, prompt(1))[0], answer(model, ids)
    report = generate(model, Words(), ids, on_text=callback, **GREEDY)
    assert list(report.token_ids) == alone
    assert {token for _, token in asked} == {expected}


def is_free(model: Any) -> bool:
    """Whether another thread could use the model now."""

    def taken() -> bool:
        found: bool = model.foreroute.lock.acquire(timeout=WAIT_S)
        if found:
            model.foreroute.lock.release()
        return found

    return bool(Thread(taken).result())


CALLS = {
    "generate": answer,
    "report": WAYS[3],
    "forward": lambda model, ids: model(ids),
    "stack": lambda model, ids: model.model(ids),
    "layer": lambda model, ids: model.model.layers[0].mlp(torch.zeros(1, 1, 64)),
    "set_policy": lambda model, ids: model.foreroute.set_policy("exact"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ctrl_c_while_waiting_leaves_nothing_locked(model, call):
    held = Held()
    talking = Thread(lambda: answer(model, prompt(2), streamer=held))
    assert held.is_inside.wait(WAIT_S)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call(model, prompt(2))
    timer.join()
    held.may_go_on.set()
    assert talking.result()
    assert is_free(model)


@pytest.fixture
def interrupted() -> Iterator[Callable[[Callable[[], Any], float], bool]]:
    """Calls something, and interrupts it after `seconds` of computing; whether it got so far."""
    is_armed = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    def calling(work: Callable[[], Any], after_s: float) -> bool:
        nonlocal is_armed
        is_armed = True
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, after_s)
            work()
        except KeyboardInterrupt:
            return True
        finally:
            was_armed, is_armed = is_armed, False
        return not was_armed

    before = signal.signal(signal.SIGVTALRM, interrupt)
    yield calling
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ctrl_c_inside_leaves_nothing_locked(model, call, interrupted):
    """At many points of a call: what follows is whole each time."""
    alone, draw = answer(model, prompt(2)), random.Random(0)
    began = time.process_time()
    call(model, prompt(2))
    took_s = time.process_time() - began
    fired = [interrupted(lambda: call(model, prompt(2)), draw.uniform(1e-6, took_s)) for _ in range(ROUNDS)]
    assert is_free(model)
    assert answer(model, prompt(2)) == alone
    # Other calls may be over before the clock has ticked once.
    assert any(fired) or call not in (CALLS["generate"], CALLS["report"])
