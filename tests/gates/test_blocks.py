"""What "exact" means with ggml's kernels: the bits of the same model with everything resident, at every budget.

That holds with and without prefetching, from a packed store, and for a token that is decoded among
others. A prompt has the bits of the pieces that it is computed in.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.batching.rows import RowsCache
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.kernels.ggml import linear as ggml_linear
from foreroute.kernels.ggml.decoder.attention import TokenAttention
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.linear import BlockLinear
from foreroute.model.text import load_tokenizer
from foreroute.prepare.pack import pack
from tests.formats.gguf_writer import Kind, Written, write_gguf
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, Output, assert_same_bits, expert_table, generate

# Type -> architecture: K-quants want rows of 256, which gpt-oss's tiny widths are not.
TYPES = {
    "F16": "qwen3moe", "BF16": "gpt-oss", "Q8_0": "qwen3moe", "Q4_0": "gpt-oss", "Q4_1": "qwen3moe", "Q5_0": "gpt-oss",
    "Q5_1": "qwen3moe", "IQ4_NL": "gpt-oss", "MXFP4": "gpt-oss", "Q4_K": "qwen3moe", "Q5_K": "qwen3moe",
    "Q6_K": "qwen3moe", "Q2_K": "qwen3moe", "Q3_K": "qwen3moe", "IQ4_XS": "qwen3moe",
}  # fmt: skip
READ = [name for name in TYPES if name in EXPERT_BLOCKS]
# Budget, prefetching. The first is little more than what one token needs.
BUDGETS = (("15%", "lookahead"), ("25%", "none"), ("50%", "lookahead"), ("100%", "none"))
NEW_TOKENS = 16
LENGTHS = (5, 14, 9, 30, 2, 11, 23, 17)
# Where the two likeliest tokens are nearer than this they may change places: prompts that share a step are products of
# other shapes than one alone.
TIE = 1e-2
WAIT_S = 120


@pytest.fixture(scope="module")
def written(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """A file whose experts are in a type, and its dense matrices too; made once."""
    made: dict[str, Written] = {}

    def get(name: str) -> Written:
        if name not in made:
            is_qwen = TYPES[name] == "qwen3moe"
            settings = (
                {"num_experts": 16, "num_hidden_layers": 2, "head_dim": 64} if is_qwen else {"num_local_experts": 16}
            )
            folder = tmp_path_factory.mktemp(name)
            made[name] = write_gguf(folder, TYPES[name], Kind[name], dense=Kind[name], **settings)
        return made[name]

    return get


def whole(load: Any, made: Written) -> Any:
    """The reference: the same kernels, everything resident."""
    model = load(made.path, "100%", prefetch="none")
    assert model.foreroute.plan.math == "ggml"
    return model


def outputs(model: Any) -> list[Output]:
    return [generate(model, batch, NEW_TOKENS) for batch in (ONE_PROMPT, THREE_PROMPTS)]


@pytest.mark.parametrize("name", READ)
def test_the_same_bits_at_every_budget(name: str, written: Any, load: Any) -> None:
    made = written(name)
    expected = outputs(whole(load, made))
    assert expected[1].num_distinct > 6, "a model that repeats itself tests little"
    for memory, prefetch in BUDGETS:
        model = load(made.path, memory, prefetch=prefetch)
        for ours, theirs in zip(outputs(model), expected, strict=True):
            assert_same_bits(ours, theirs)
        stats, plan = model.foreroute.stats(), model.foreroute.plan
        assert plan.math == "ggml"
        assert all(isinstance(layer, GgmlLayer) for layer in model.foreroute.engine.kernels)
        assert sum(isinstance(module, BlockLinear) for module in model.modules()) > 8
        assert (stats.evictions > 0) == (memory != "100%")
        if prefetch != "none" and memory != "100%":
            assert stats.prefetch_used > 0
        assert stats.decode.hits > 0 or memory == "15%", "so few slots that few experts are met twice"


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_the_same_bits_from_a_packed_store(name: str, written: Any, load: Any, tmp_path: Path) -> None:
    made, store = written(name), tmp_path / "model.foreroute"
    pack(expert_table(made.path), store, progress=lambda done, total: None)
    model = load(made.path, "25%", packed=str(store))
    assert model.foreroute.plan.source == "packed"
    for ours, theirs in zip(outputs(model), outputs(whole(load, made)), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("chunk", [8, 13])
@pytest.mark.parametrize("name", ["Q8_0", "MXFP4"])
def test_the_same_bits_in_pieces(name: str, chunk: int, written: Any, load: Any) -> None:
    """Of the same pieces; a prompt at once may differ in the last places."""
    made = written(name)
    one, other = (load(made.path, memory, prefill_chunk=chunk) for memory in ("15%", "100%"))
    assert_same_bits(generate(one, ONE_PROMPT, NEW_TOKENS), generate(other, ONE_PROMPT, NEW_TOKENS))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 240, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def decoded_alone(model: Any) -> list[list[torch.Tensor]]:
    """Per prompt the logits [vocabulary] of its prefill and of each token after it, greedy."""
    steps = []
    for ids in prompts():
        rows = RowsCache(model)
        rows.arrange([], [(None, 0)])
        steps.append([rows.step([ids], "prefill")[0, -1]])
        for _ in range(NEW_TOKENS):
            steps[-1].append(rows.step([[int(steps[-1][-1].argmax())]], "decode")[0, -1])
    return steps


@torch.no_grad()
def decoded_together(model: Any) -> list[list[torch.Tensor]]:
    """The same; each token is decoded in a step with those of all others, which join one by one."""
    together, steps = RowsCache(model), list[list[torch.Tensor]]()

    def decode() -> None:
        logits = together.step([[int(row[-1].argmax())] for row in steps], "decode")
        for at, row in enumerate(steps):
            row.append(logits[at, -1])

    for ids in prompts():
        rows = RowsCache(model)
        rows.arrange([], [(None, 0)])
        first = rows.step([ids], "prefill")[0, -1]
        together.append_from(rows, [0])
        steps.append([first])
        decode()
    while len(steps[-1]) <= NEW_TOKENS:
        decode()
    return [row[: NEW_TOKENS + 1] for row in steps]


def first_difference(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> str:
    for row, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for step, (one, other) in enumerate(zip(left, right, strict=True)):
            if not torch.equal(one.view(torch.int32), other.view(torch.int32)):
                return f"row {row}, step {step}: by up to {float((one - other).abs().max()):.3g}"
    return ""


@pytest.mark.parametrize("name", READ)
def test_a_token_among_eight_has_the_bits_that_it_has_alone(name: str, written: Any, load: Any) -> None:
    """Resident and alone, against a small budget and in company: products, routers, attention and sums by row."""
    made = written(name)
    alone = decoded_alone(whole(load, made))
    model = load(made.path, "25%")
    assert first_difference(decoded_together(model), alone) == ""
    assert model.foreroute.stats().evictions > 0


def test_what_gives_a_row_other_bits_in_company(written: Any, load: Any, monkeypatch: Any) -> None:
    """Each of the three causes that were found is seen when it is let in again: the gate above would go red.

    In F16: rounding activations to 8 bits hides most of such differences.
    """
    model = whole(load, written("F16"))
    alone = decoded_alone(model)
    assert first_difference(decoded_together(model), alone) == ""
    with monkeypatch.context() as patch:  # torch's product in routers, as where a graph does not choose
        for layer in model.get_decoder().layers:
            fused = layer.__dict__["forward"]
            patch.setattr(fused, "_routed", replace(fused._routed, is_plain=lambda: False))
        patch.setattr(
            ggml_linear, "_router_product", lambda weight, x, bias=None: torch.nn.functional.linear(x, weight, bias)
        )
        assert first_difference(decoded_together(model), alone)
    with monkeypatch.context() as patch:  # torch's attention, over padded keys
        patch.setattr(TokenAttention, "takes", lambda *_: False)
        patch.setattr("foreroute.model.decode.layers.sees_all", lambda *_: False)
        alone = decoded_alone(model)
        assert first_difference(decoded_together(model), alone) == ""
        patch.setattr("foreroute.batching.rows.attends_by_interface", lambda model: False)
        assert first_difference(decoded_together(model), alone)
    with monkeypatch.context() as patch:  # products in bf16 from some rows on
        linear = [module for module in model.modules() if isinstance(module, BlockLinear)]
        for module in linear:
            patch.setattr(module._group, "bf16_from", 4)
        alone = decoded_alone(model)
        assert first_difference(decoded_together(model), alone) == ""
        patch.setattr(linear[0]._products, "decodes", lambda: False)
        assert first_difference(decoded_together(model), alone)


def test_two_models_decode_at_once(written: Any, load: Any) -> None:
    """Attention by row is of the model whose step runs, also where two threads are in the midst of one each."""
    models = [whole(load, written(name)) for name in ("Q8_0", "MXFP4")]
    alone = [decoded_alone(model) for model in models]
    found: dict[int, str] = {}

    def decode(at: int) -> None:
        found[at] = first_difference(decoded_together(models[at]), alone[at])

    threads = [threading.Thread(target=decode, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == {0: "", 1: ""}


def test_another_thread_calls_the_model_while_rows_share_steps(written: Any, load: Any) -> None:
    model = whole(load, written("Q8_0"))
    alone, expected = decoded_alone(model), generate(model, THREE_PROMPTS, NEW_TOKENS)
    found: list[Output] = []
    other = threading.Thread(target=lambda: found.extend(generate(model, THREE_PROMPTS, NEW_TOKENS) for _ in range(3)))
    other.start()
    assert first_difference(decoded_together(model), alone) == ""
    other.join(WAIT_S)
    assert len(found) == 3
    for one in found:
        assert_same_bits(one, expected)


def answers(engine: BatchEngine, *, together: bool) -> list[list[NewToken]]:
    heard = [Heard() for _ in LENGTHS]
    for ids, one in zip(prompts(), heard, strict=True):
        engine.submit(Request(ids, NEW_TOKENS, Sampling(temperature=0.0), num_top_logprobs=2, ignore_eos=True), one)
        if not together:
            one.wait()
    return [one.wait() for one in heard]


class Heard:
    """One request's events."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.is_over = threading.Event()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.is_over.set()

    def wait(self) -> list[NewToken]:
        assert self.is_over.wait(WAIT_S), "the request did not end"
        return [event for event in self.events if isinstance(event, NewToken)]


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "Q4_0"])
def test_eight_requests_say_what_each_says_alone(name: str, written: Any, load: Any, monkeypatch: Any) -> None:
    """Through the server's engine, where prompts share steps too; up to a tie, which is listed."""
    monkeypatch.setattr("foreroute.kernels.ggml.bf16.has_bf16", lambda: False)
    made = written(name)
    engine = BatchEngine(load(made.path, "25%"), load_tokenizer(made.path), 128)
    try:
        alone, together = answers(engine, together=False), answers(engine, together=True)
    finally:
        engine.close()
    ties = []
    for row, (left, right) in enumerate(zip(alone, together, strict=True)):
        assert len(left) == len(right) == NEW_TOKENS
        differing = [at for at in range(NEW_TOKENS) if left[at].token_id != right[at].token_id]
        if differing:
            best, second = left[differing[0]].top[:2]
            assert best[1] - second[1] < TIE, (row, differing[0])
            ties.append((row, differing[0]))
    print(f"{name}: ties at {ties}" if ties else f"{name}: no ties")
    assert len(ties) < len(LENGTHS) // 2
