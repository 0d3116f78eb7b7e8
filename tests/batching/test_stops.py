"""Special tokens in an answer: they are no text, and yet may be a stop text, or be shown where they mark its parts."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.cli.commands import demo
from foreroute.generation.recorder import TokenRecorder
from foreroute.model.text import StopText, TextPieces, load_tokenizer, special_tokens
from tests.cli.harness import SPECIAL, make_tokenizer

BYTES = make_tokenizer()
END, USER, ASSISTANT, SYSTEM = range(4)


def ids_of(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


def test_what_is_special() -> None:
    assert special_tokens(BYTES) == dict(enumerate(SPECIAL))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [((), "aéb"), (("<|user|>",), "a<|user|>éb<|user|>"), (SPECIAL, "a<|user|>é<|end|>b<|user|>")],
)
def test_special_tokens_are_shown_that_are_asked_for(shown: tuple[str, ...], expected: str) -> None:
    pieces = TextPieces(BYTES, shown)
    text = "".join(pieces.push(one) for one in ids_of("a<|user|>é<|end|>b<|user|>"))
    assert text + pieces.finish() == expected
    assert [bool(pieces.hidden(one)) for one in (END, USER, 10)] == [
        "<|end|>" not in shown,
        "<|user|>" not in shown,
        False,
    ]


def _is_plain(text: str) -> bool:
    """Whether it has no special token in it, which would be left out of the pieces."""
    return not any(special in text for special in SPECIAL)


@given(st.text("a<|usernd>", max_size=8).filter(_is_plain), st.sampled_from(SPECIAL))
def test_a_special_token_as_a_stop_text_ends_an_answer(before: str, stop: str) -> None:
    stopping, pieces = StopText([stop]), TextPieces(BYTES)
    said = ""
    for one in [*ids_of(before + "é"), SPECIAL.index(stop), *ids_of("more")]:
        said += stopping.push(pieces.push(one), pieces.hidden(one))
        if stopping.is_over:
            break
    assert stopping.is_over
    assert said + stopping.rest() == before + "é"


def test_stop_texts_with_a_special_token_in_them() -> None:
    for stop, text, expected in (
        ("<|end|>\n", "one<|end|>two<|end|>\nthree", "onetwo"),
        (".<|end|>", "one.two.<|end|>three", "one.two"),
        ("<|end|><|user|>", "one<|end|>two<|end|><|user|>", "onetwo"),
        ("two", "one<|end|>two", "one"),
        # What stood beside a special token does not become a stop text when that is left out.
        ("onetwo", "one<|end|>two", None),
    ):
        stopping, pieces = StopText([stop]), TextPieces(BYTES)
        said = "".join(stopping.push(pieces.push(one), pieces.hidden(one)) for one in ids_of(text))
        assert stopping.is_over == (expected is not None), stop
        assert stopping.found == (None if expected is None else stop)
        assert said + stopping.rest() == (expected if expected is not None else "onetwo")


def test_generate_stops_there_too() -> None:
    heard: list[str] = []
    recorder = TokenRecorder(BYTES, heard.append, lambda: 0.0, ["<|user|>"])
    recorder.put(torch.tensor([1]))
    for one in ids_of("ab<|end|>c<|user|>d"):
        recorder.add(one)
    recorder.end()
    assert recorder.is_over
    assert "".join(heard) == "abc"


@pytest.fixture(scope="module")
def shipped() -> Any:
    import foreroute

    return foreroute.load(demo.find_model(), dtype="float32"), load_tokenizer(demo.find_model())


@pytest.fixture
def ask(shipped: Any) -> Iterator[Callable[..., tuple[str, list[int], Finished]]]:
    engine = BatchEngine(*shipped, 64, 1, 1)

    def asking(**more: Any) -> tuple[str, list[int], Finished]:
        events: list[Any] = []
        is_over = threading.Event()

        def on_event(event: Any) -> None:
            events.append(event)
            if isinstance(event, Finished):
                is_over.set()

        engine.submit(Request([5, 6], 6, ignore_eos=True, **more), on_event)
        assert is_over.wait(60)
        tokens = [event for event in events if isinstance(event, NewToken)]
        return "".join(one.text for one in [*tokens, events[-1]]), [one.token_id for one in tokens], events[-1]

    yield asking
    engine.close()


def test_the_engine_obeys(shipped: Any, ask: Callable[..., tuple[str, list[int], Finished]]) -> None:
    user = shipped[1].convert_tokens_to_ids("<|user|>")
    always = Sampling(temperature=0.0, logit_bias={user: 100.0})
    text, ids, end = ask(sampling=always, stop=["<|user|>"])
    assert (text, ids, end.reason) == ("", [user], "stop")
    text, ids, end = ask(sampling=always, stop=["<|user|><|user|>"])
    assert (text, ids, end.reason) == ("", [user] * 2, "stop")
    text, ids, end = ask(sampling=always)
    assert (text, ids, end.reason) == ("", [user] * 6, "length")
    text, ids, end = ask(sampling=always, shown_special=["<|user|>"])
    assert (text, end.reason) == ("<|user|>" * 6, "length")
    # Its own end, which the request leaves unobeyed, is a stop text as any other.
    own = shipped[1].eos_token_id
    text, ids, end = ask(sampling=Sampling(temperature=0.0, logit_bias={own: 100.0}), stop=[shipped[1].eos_token])
    assert (text, ids, end.reason) == ("", [own], "stop")
