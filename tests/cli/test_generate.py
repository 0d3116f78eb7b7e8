"""`foreroute generate` in this process: what goes where, what --json holds, and how errors look."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from foreroute.cli import figures
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS

FAST = ("--memory", "25%", "--threads", "1", "--max-new-tokens", "20")


def resident_text(tiny: Path, tokenizer, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], str]:
    """What the resident model generates, greedily."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny, experts_implementation="eager")
    out = model.generate(torch.tensor([prompt_ids]), max_new_tokens=num_tokens, do_sample=False)[0, len(prompt_ids) :]
    return out.tolist(), tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")


def test_text_goes_to_stdout_and_figures_to_stderr(run, tiny: Path, tokenizer) -> None:
    ran = run("generate", tiny, "hello", "--no-chat", *FAST)
    assert ran.code == 0
    _, text = resident_text(tiny, tokenizer, tokenizer.encode("hello"), 20)
    assert text
    assert ran.out == text + "\n"
    for name in (
        "TTFT", "TPOT", "tokens/s", "hits", "late hits", "misses", "MB/token", "stall", "evictions", "peak RSS",
    ):  # fmt: skip
        assert name in ran.err
    assert f"16 of {NUM_LAYERS * NUM_EXPERTS} experts" in ran.err
    assert max(map(len, ran.err.splitlines())) <= 80


def test_quiet_is_the_text_alone(run, tiny: Path) -> None:
    ran = run("generate", tiny, "hello", "--quiet", *FAST)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out


def test_json_is_one_object_with_units_in_its_names(run, tiny: Path, tokenizer) -> None:
    ran = run("generate", tiny, "hello", "--no-chat", "--json", *FAST)
    assert (ran.code, ran.err) == (0, "")
    ids, text = resident_text(tiny, tokenizer, tokenizer.encode("hello"), 20)
    answer = ran.json
    assert set(answer) == {"model", "text", "finish_reason", "loop", "prefetch_why", "token_ids", "figures", "plan"}
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == (text, ids, "length")
    found = answer["figures"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (5, 20)
    assert all(found[name] > 0 for name in ("ttft_s", "tpot_ms", "tokens_per_s", "prefill_tokens_per_s", "evictions"))
    assert all(
        isinstance(found[name], int | float)
        for name in ("hit_rate", "demand_mb_per_token", "prefetch_mb_per_token", "prefetch_used_mb_per_token",
                     "prefetch_wasted_mb_per_token", "stall_ms_per_token", "prefetch_used", "peak_rss_bytes")
    )  # fmt: skip
    assert answer["plan"]["num_slots"] == 16


def test_prompts_from_a_file_and_from_a_pipe_are_the_same(run, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompt").write_text("über\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("über\n".encode())))
    outs = [
        run("generate", tiny, *source, "--quiet", *FAST) for source in (["über"], ["--file", tmp_path / "prompt"], [])
    ]
    assert [ran.code for ran in outs] == [0, 0, 0]
    assert outs[0].out == outs[1].out == outs[2].out


def test_a_seed_draws_the_same_again(run, tiny: Path) -> None:
    drawn = [run("generate", tiny, "x", "--temperature", "2.0", "--seed", seed, "--json", *FAST) for seed in "112"]
    first, second, third = (ran.json["token_ids"] for ran in drawn)
    assert first == second != third


def test_the_chat_template_is_used_by_itself(run, tiny: Path) -> None:
    counts = [
        run("generate", tiny, "hello", *flags, "--json", *FAST).json["figures"]["prompt_tokens"]
        for flags in ([], ["--no-chat"], ["--system", "be"])
    ]
    assert counts == [7, 5, 10]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{tiny}", "hello", "--memory", "1KiB"], "one token needs 8. Raise --memory to 384.0 KiB"),
        (["{tiny}", "hello", "--memory", "lots"], "'lots' is not an amount of memory"),
        (["{tiny}", "hello", "--system", "x", "--no-chat"], "chat template"),
        (["{tiny}", "hello" * 300], "the model's context holds"),
        (["{tiny}", "hello", "--packed", "{tiny}/absent"], "foreroute pack"),
        (["{tiny}/config.json", "hello"], "is a file"),
        (["{tiny}", "hello", "--file", "{tiny}/config.json"], "Give one of them"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_error_is_one_line_that_says_what_to_do(run, tiny: Path, args: list[str], said: str) -> None:
    ran = run("generate", *(arg.replace("{tiny}", str(tiny)) for arg in args))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("foreroute: error: ")
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


def test_debug_shows_where_an_error_comes_from(run, tiny: Path) -> None:
    ran = run("generate", tiny, "hello", "--memory", "1KiB", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert "foreroute: error: " in ran.err


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_model_cannot_steer_the_terminal() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        figures.writer(out)("a\x1b[2J\tb\n\x0e\x9b€")
    assert terminal.getvalue() == "a\ufffd[2J\tb\n\ufffd\ufffd€"
    assert pipe.getvalue() == "a\x1b[2J\tb\n\x0e\x9b€"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "ms", "–"), (0, "", "0.00"), (1.234, "s", "1.23 s"), (12.34, "", "12.3"), (99.99, "", "100"),
     (12345, "ms", "12,345 ms")],
)  # fmt: skip
def test_numbers_have_three_digits(value, unit: str, text: str) -> None:
    assert figures.number(value, unit) == text


def test_an_answer_fits_its_schema_regex_or_grammar(run, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
    (tmp_path / "schema.json").write_text(
        '{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}', encoding="utf-8"
    )
    (tmp_path / "digits.lark").write_text("start: /[0-9]{3}/", encoding="utf-8")
    drawn = ["--temperature", "1", "--seed", "1", "--no-chat", "--json", "--max-new-tokens", "60"]
    told = run("generate", tiny, "x", "--json-schema", tmp_path / "schema.json", *drawn).json
    assert told["finish_reason"] == "stop"
    assert all(isinstance(one, bool) for one in json.loads(told["text"]))
    assert re.fullmatch("[a-c]{2,4}", run("generate", tiny, "x", "--regex", "[a-c]{2,4}", *drawn).json["text"])
    assert re.fullmatch(
        "[0-9]{3}", run("generate", tiny, "x", "--grammar", tmp_path / "digits.lark", *drawn).json["text"]
    )


def test_reasoning_that_the_prompt_opens_is_free(run, copied: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
    template = copied / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.unlink()
    template.write_text(f"{text}<think>{{# </think> #}}", encoding="utf-8")
    drawn = ["--json", "--regex", "[0-9]+", *FAST]
    # It never says </think>.
    assert not run("generate", copied, "x", *drawn).json["text"].isdigit()
    assert run("generate", copied, "x", "--no-chat", *drawn).json["text"].isdigit()


def test_what_cannot_be_enforced_is_named_with_its_file(run, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
    path = tmp_path / "schema.json"
    path.write_text('{"not": {}}', encoding="utf-8")
    ran = run("generate", tiny, "x", "--json-schema", path)
    assert f'{path}: The schema has "not", which cannot be enforced' in ran.err
    assert "regex is not accepted: unclosed group" in run("generate", tiny, "x", "--regex", "((").err
    path.write_text("{", encoding="utf-8")
    assert f"{path}: The schema is not valid JSON" in run("generate", tiny, "x", "--json-schema", path).err
