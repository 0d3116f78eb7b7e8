"""Clients as people have them, unmodified, against the model that ships."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import NAME, Process, serving

QUESTION = "12 + 34"
# The model was trained to show the sum digit by digit.
ANSWER = "2+4+0=6 c0\n1+3+0=4 c0\n= 46"
MESSAGES = [{"role": "user", "content": QUESTION}]


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package.split(".")[0]) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}, which foreroute[dev] installs")


@pytest.fixture(scope="module")
def served() -> Iterator[Process]:
    with serving() as process:
        yield process


@needs("openai")
def test_openai(served: Process) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=60)
    assert chat.choices[0].message.content == ANSWER
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=60, stream=True, stream_options={"include_usage": True},
            logprobs=True, top_logprobs=2,
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert usage.prompt_tokens_details.cached_tokens > 0, "the same prompt a second time"
    scores = [one for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for one in
              chunk.choices[0].logprobs.content]  # fmt: skip
    assert all(one.top_logprobs[0].logprob == one.logprob for one in scores)
    text = client.completions.create(model=NAME, prompt=f"<|user|>{QUESTION}<|assistant|>", max_tokens=60, stop="\n")
    assert text.choices[0].text == ANSWER.split("\n")[0]
    stopped = client.chat.completions.create(model=NAME, messages=MESSAGES, stop=["4 c", "0\n1"])
    # Across tokens, and nothing of the stop text.
    assert stopped.choices[0].message.content == "2+4+0=6 c"
    assert stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=[], max_tokens=60)
    assert refused.value.param == "messages"
    # As agents send it: more than the context has left.
    agents = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=32_000)
    assert agents.choices[0].message.content == ANSWER
    long = [{"role": "user", "content": "a b " * 3000}]
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.chat.completions.create(model=NAME, messages=long, max_tokens=32_000)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


@needs("openai")
def test_openai_sampling(served: Process) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    def drawn(seed: int | None, n: int = 1) -> list[str]:
        found = client.completions.create(model=NAME, prompt="import", max_tokens=12, temperature=1.5, seed=seed, n=n)
        return [choice.text for choice in found.choices]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert len(set(drawn(5, n=3))) == 3
    greedy = client.completions.create(model=NAME, prompt="import", max_tokens=12, temperature=0).choices[0].text
    scored = client.completions.create(model=NAME, prompt="import", max_tokens=12, temperature=0, logprobs=3)
    assert scored.choices[0].text == greedy


@needs("openai")
def test_openai_async_and_several_at_once(served: Process) -> None:
    import openai

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(stream: bool) -> str | None:
                if not stream:
                    chat = await client.chat.completions.create(model=NAME, messages=MESSAGES)
                    return chat.choices[0].message.content
                pieces = await client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True)
                return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

            return await asyncio.gather(*(one(stream=at % 2 == 0) for at in range(4)))

    assert asyncio.run(ask()) == [ANSWER] * 4


@needs("langchain_openai")
def test_langchain(served: Process) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", model=NAME, max_tokens=60, temperature=0)
    assert model.invoke(QUESTION).content == ANSWER
    pieces = list(model.stream([("system", "Add."), ("user", QUESTION)]))
    assert len(pieces) > 5
    assert "".join(str(piece.content) for piece in pieces)


@needs("llama_index.llms.openai_like")
def test_llama_index(served: Process) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chatting, completing = (
        OpenAILike(model=NAME, api_base=f"{served.url}/v1", api_key="none", is_chat_model=is_chat, max_tokens=60,
                   temperature=0)
        for is_chat in (True, False)
    )  # fmt: skip
    assert chatting.chat([ChatMessage(role="user", content=QUESTION)]).message.content == ANSWER
    assert completing.complete(f"<|user|>{QUESTION}<|assistant|>").text == ANSWER
    pieces = completing.stream_complete(f"<|user|>{QUESTION}<|assistant|>")
    assert "".join(piece.delta or "" for piece in pieces) == ANSWER


@needs("llm")
def test_llm(served: Process, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {NAME}\n  api_base: {served.url}/v1\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "ours", "--key", "none", QUESTION],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.strip() == ANSWER, done.stderr[-2000:]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], yaml: str) -> None:
    rows_path = folder / f"{name}.jsonl"
    rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"cache_dir": str(folder / "cache"), "data_files": {"test": str(rows_path)}}
    head = f"task: {name}\ntest_split: test\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\n"
    (folder / f"{name}.yaml").write_text(head + yaml)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's TaskManager with a task of likelihoods, and one of answers with and one without a chat template."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install foreroute[eval]")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    choices = [
        {"text": "import os\nimport", "options": ["sys", "the", "banana 漢"], "right": 0},
        {"text": "<|user|>12 + 34<|assistant|>2+4+0=", "options": ["5 c1", "6 c0"], "right": 1},
        {"text": "A list of the names of all", "options": ["of", "files"], "right": 0},
    ]
    write_task(
        folder, "served_choice", choices,
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{options}}"\n'
        'doc_to_target: "{{right}}"\nmetric_list: [{metric: acc}]\n',
    )  # fmt: skip
    sums = [{"text": QUESTION, "answer": ANSWER}, {"text": "50 + 49", "answer": "0+9+0=9 c0\n5+4+0=9 c0\n= 99"}]
    for name, text in (("served_sums", "<|user|>{{text}}<|assistant|>"), ("served_chat", "{{text}}")):
        write_task(
            folder, name, sums,
            f'output_type: generate_until\ndoc_to_text: "{text}"\ndoc_to_target: "{{{{answer}}}}"\n'
            'generation_kwargs: {until: ["<|end|>"], max_gen_toks: 48, do_sample: false}\n'
            "metric_list: [{metric: exact_match}]\n",
        )  # fmt: skip
    return TaskManager(include_path=str(folder), include_defaults=False)


@needs("lm_eval")
def test_lm_eval(served: Process, tasks: Any, load: Any) -> None:
    """Likelihoods over HTTP are those in process; so are the answers, with and without the chat template."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from foreroute.cli.commands import demo
    from foreroute.model.text import load_tokenizer

    over_http = f"model={NAME},base_url={served.url}/v1/completions,batch_size=2"
    names = ["served_choice", "served_sums"]
    remote = simple_evaluate("local-completions", model_args=over_http, tasks=names, task_manager=tasks)
    model = load(demo.find_model(), "50%", dtype="float32", predictor="no")
    inner = HFLM(pretrained=model, tokenizer=load_tokenizer(demo.find_model()), batch_size=1)
    local = simple_evaluate(inner, tasks=names, task_manager=tasks)
    both = [
        [tuple(response) for document in found["samples"]["served_choice"] for response in document["filtered_resps"]]
        for found in (remote, local)
    ]
    assert len(both[0]) == 7
    for (over, is_greedy), (inside, is_greedy_inside) in zip(*both, strict=True):
        assert over == pytest.approx(inside, abs=1e-4)
        assert is_greedy == is_greedy_inside
    assert any(is_greedy for _, is_greedy in both[0])
    assert remote["results"]["served_choice"]["acc,none"] == 1.0
    assert remote["results"]["served_sums"]["exact_match,none"] == 1.0
    chat = simple_evaluate(
        "local-chat-completions", model_args=f"model={NAME},base_url={served.url}/v1/chat/completions",
        tasks=["served_chat"], task_manager=tasks, apply_chat_template=True,
    )  # fmt: skip
    assert chat["results"]["served_chat"]["exact_match,none"] == 1.0
