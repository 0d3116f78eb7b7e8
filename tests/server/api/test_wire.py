"""The wire contract over a fake engine: shapes, the order of a stream, whole characters, logprobs, echo."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served

Serve = Callable[..., Served]


def events(response: Any) -> list[Any]:
    """The events of a stream; its end is checked here, for all tests."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_chat_in_full(serve: Serve) -> None:
    served = serve(answer="Good day")
    found = served.chat(model="tiny", max_tokens=20).json()
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Good day", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    # <|user|> Hi <|assistant|>: two special tokens and two bytes.
    assert found["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip


def test_the_order_of_a_stream(serve: Serve) -> None:
    chunks = events(serve(answer="Hey").chat(stream=True, stream_options={"include_usage": True}))
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "H"}, None),
        ({"content": "e"}, None),
        ({"content": "y"}, None),
        ({}, "stop"),
    ]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 4 + 3
    without = events(serve(answer="Hey").chat(stream=True))
    assert all("usage" not in chunk for chunk in without)
    assert without[-1]["choices"][0]["finish_reason"] == "stop"


def test_never_half_a_character(serve: Serve) -> None:
    answer = "é漢😀👩‍👩‍👧"
    chunks = events(serve(answer=answer).chat(stream=True, logprobs=True))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == answer
    assert all("\ufffd" not in text for text in texts)
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == answer
    # Cut in the middle of a character: its bytes are in the logprobs, and not in the text.
    cut = serve(answer="a漢").chat(max_tokens=3, logprobs=True).json()["choices"][0]
    assert cut["message"]["content"] == "a"
    assert cut["finish_reason"] == "length"
    assert [entry["bytes"] for entry in cut["logprobs"]["content"]] == [[0x61], [0xE6], [0xBC]]
    streamed = events(serve(answer="a漢").chat(max_tokens=3, logprobs=True, stream=True))
    kept = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [entry["bytes"] for one in kept if one for entry in one["content"]] == [[0x61], [0xE6], [0xBC]]


def test_top_logprobs(serve: Serve) -> None:
    choice = serve(answer="ab").chat(logprobs=True, top_logprobs=3).json()["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "a"
    assert first["bytes"] == [97]
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "b", "c"]
    assert first["top_logprobs"][0]["logprob"] == first["logprob"]
    none = serve(answer="ab").chat(logprobs=True).json()["choices"][0]
    assert none["logprobs"]["content"][0]["top_logprobs"] == []


def test_several_answers(serve: Serve) -> None:
    served = serve(answer="ab")
    found = served.chat(n=3, seed=7).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == 4
    assert found["usage"]["completion_tokens"] == 6
    assert len({request.sampling.seed for request in served.engine.requests}) == 3
    chunks = events(served.chat(n=2, stream=True))
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(one["delta"].get("content", "") for one in own) == "ab"
        assert own[-1]["finish_reason"] == "stop"


def test_what_is_asked_reaches_the_engine(serve: Serve) -> None:
    served = serve()
    served.chat(
        temperature=0.5, top_p=0.9, seed=3, stop=["x", "yz"], max_completion_tokens=5, frequency_penalty=1,
        presence_penalty=-1, logit_bias={"5": -100}, logprobs=True, top_logprobs=2, user="me", metadata={"a": "b"},
    )  # fmt: skip
    (request,) = served.engine.requests
    assert request.stop == ["x", "yz"]
    assert request.max_new_tokens == 5
    assert request.num_top_logprobs == 2
    assert request.sampling.temperature == 0.5
    assert request.sampling.top_p == 0.9
    assert request.sampling.seed == 3
    assert request.sampling.frequency_penalty == 1.0
    assert request.sampling.presence_penalty == -1.0
    assert request.sampling.logit_bias == {5: -100}
    assert request.sampling.top_k is None, "the model's own holds"
    served.chat(top_k=-1, min_tokens=4)
    assert (served.engine.requests[-1].sampling.top_k, served.engine.requests[-1].sampling.min_tokens) == (0, 4)


@pytest.mark.parametrize("asked", [True, False, None])
def test_whether_the_models_own_end_ends_an_answer(serve: Serve, asked: bool | None) -> None:
    served = serve()
    assert served.chat(ignore_eos=asked).status_code == 200
    assert served.complete(ignore_eos=asked).status_code == 200
    served.chat()
    served.complete()
    assert [request.ignore_eos for request in served.engine.requests] == [bool(asked)] * 2 + [False] * 2
    refused = served.chat(ignore_eos="yes")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "ignore_eos"


def test_completion_in_full_and_streamed(serve: Serve) -> None:
    served = serve(answer="bcd")
    found = served.complete("a", max_tokens=3).json()
    assert found["object"] == "text_completion"
    assert found["choices"] == [{"index": 0, "text": "bcd", "logprobs": None, "finish_reason": "stop"}]
    chunks = events(served.complete("a", stream=True, stream_options={"include_usage": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["b", "c", "d", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    served.complete("a")
    assert served.engine.requests[-1].max_new_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(serve: Serve, stream: bool) -> None:
    """What lm-eval asks for: token ids, the prompt's own logprobs, and one token more."""
    served = serve(answer="z")
    prompt = served.client.post("/tokenize", json={"prompt": "a漢", "add_special_tokens": False}).json()["tokens"]
    assert len(prompt) == 4
    response = served.complete(prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234, stream=stream)
    if stream:
        parts = [chunk["choices"][0] for chunk in events(response)]
        text = "".join(part["text"] for part in parts)
        found = [part["logprobs"] for part in parts if part["logprobs"]]
        logprobs = {name: [one for part in found for one in part[name]] for name in found[0]}
    else:
        choice = response.json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "a漢z"
    assert logprobs["tokens"] == ["a", "bytes:\\xe6", "bytes:\\xbc", "bytes:\\xa2", "z"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2]
    for token, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == logprob == max(top.values())


def test_several_prompts(serve: Serve) -> None:
    served = serve(answer="z")
    found = served.complete([[5, 6], [7]], n=2, echo=True, max_tokens=1).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in found["choices"]]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] != texts[0]
    assert all(text.endswith("z") for text in texts)
    assert found["usage"]["prompt_tokens"] == 3
    assert [list(request.prompt_ids) for request in served.engine.requests] == [[5, 6], [5, 6], [7], [7]]
    assert len(served.complete(["a", "b"]).json()["choices"]) == 2
    scored = served.complete([5, 6], echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert len(scored["logprobs"]["token_logprobs"]) == 2
    # None of the likeliest are wanted; the one that came is there all the same.
    assert list(scored["logprobs"]["top_logprobs"][1]) == [scored["logprobs"]["tokens"][1]]
    assert scored["finish_reason"] == "length"


def test_models_version_and_tokens(serve: Serve) -> None:
    client = serve().client
    listed = client.get("/v1/models").json()
    assert listed == client.get("/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "other"]
    assert client.get("/v1/models/other").json()["id"] == "other"
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.get("/version").json()["version"]
    assert client.get("/health").json()["phase"] == "ready"
    tokens = client.post("/tokenize", json={"prompt": "añ"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 3
    assert tokens["max_model_len"] == 64
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "añ"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["count"] == 4
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|end|>"


def test_an_error_in_a_stream(serve: Serve) -> None:
    served = serve(answer="abcdef")
    served.engine.error = "the disk is gone"
    chunks = events(served.chat(stream=True))
    assert chunks[-1]["error"]["message"] == "the disk is gone"
    assert chunks[-1]["error"]["type"] == "server_error"
    assert served.chat().status_code == 500
    assert served.chat().json()["error"]["message"] == "the disk is gone"
