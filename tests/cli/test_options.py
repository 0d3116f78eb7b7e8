"""Flags: one per field of EngineConfig, prompts from wherever they come, and sampling under transformers' names."""

import argparse
import io
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from foreroute.cli import options
from foreroute.cli.commands import generate
from foreroute.cli.main import COMMANDS, build_parser
from foreroute.config import EngineConfig
from foreroute.errors import ForerouteError, PromptError

# For every field: the flags, and what they ask for. A new field fails the test below until it stands here.
ASKED = {
    "memory": (["--memory", "8GiB"], "8GiB"),
    "draft": (["--draft", "prompt-lookup"], "prompt-lookup"),
    "eviction": (["--eviction", "lru"], "lru"),
    "prefetch": (["--prefetch", "none"], "none"),
    "predictor": (["--predictor", "no"], "no"),
    "prefetch_prefill": (["--prefetch-prefill", "on"], "on"),
    "prefill_chunk": (["--prefill-chunk", "512"], 512),
    "prefetch_width": (["--prefetch-width", "6"], 6),
    "governor": (["--no-governor"], False),
    "cache": (["--no-cache"], False),
    "hits_first": (["--no-hits-first"], False),
    "reader_threads": (["--reader-threads", "2"], 2),
    "direct_io": (["--no-direct-io"], False),
    "packed": (["--packed", "no"], "no"),
    "math": (["--math", "torch"], "torch"),
    "dense": (["--dense", "q8_0"], "q8_0"),
    "device": (["--device", "cuda"], "cuda"),
    "control": (["--control", "device"], "device"),
    "host_memory": (["--host-memory", "48GiB"], "48GiB"),
    "kv_tokens": (["--kv-tokens", "8192"], 8192),
    "prefix_cache": (["--prefix-cache", "4GiB"], "4GiB"),
    "prefix_cache_dir": (["--prefix-cache-dir", "kept"], "kept"),
    "policy": (["--policy", "tolerance:0.1"], "tolerance:0.1"),
    "trace": (["--trace", "run.jsonl"], "run.jsonl"),
    "deterministic": (["--deterministic"], True),
}


def parsed(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["generate", "MODEL", "prompt", *flags])


def test_without_flags_the_defaults_of_the_config_hold() -> None:
    assert options.engine_config(parsed()) == EngineConfig()


@pytest.mark.parametrize("field", fields(EngineConfig), ids=lambda field: field.name)
def test_every_field_has_its_flag(field) -> None:
    flags, value = ASKED[field.name]
    config = options.engine_config(parsed(*flags))
    assert getattr(config, field.name) == value != getattr(EngineConfig(), field.name)


@pytest.mark.parametrize("command", ["verify", "bench", "eval", "demo"])
def test_commands_that_stay_on_the_cpu_have_no_flag_for_a_gpu(command, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--suite", "builtin"] if command == "eval" else []
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "MODEL", *asked, "--device", "cuda"])
    assert "--device" in capsys.readouterr().err


def test_a_value_that_the_config_refuses_is_our_error() -> None:
    with pytest.raises(ForerouteError, match="reader_threads is 99"):
        options.engine_config(parsed("--reader-threads", "99"))


@pytest.mark.parametrize(
    "flags",
    [["--unknown"], ["--eviction", "fifo"], ["--top-p", "1.5"], ["--top-p", "0"], ["--temperature", "-1"],
     ["--max-new-tokens", "0"], ["--top-k", "x"], ["--threads", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_flag_is_named_by_argparse(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.__name__.split(".")[-1])
def test_help_fits_a_terminal_and_teaches(command, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = command.__name__.split(".")[-1].replace("evaluate", "eval")
    with pytest.raises(SystemExit):
        build_parser().parse_args([name, "--help"])
    text = capsys.readouterr().out
    assert "example" in text
    assert f"foreroute {name}" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "%%" not in text


ABLATIONS = [field.name for field in fields(EngineConfig) if field.metadata["is_ablation"]]


def help_of(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([name, flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_ablation_switches_are_shown_by_help_all_alone(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = {flag: help_of("generate", flag, capsys) for flag in ("--help", "--help-all")}
    flags = [f"\n  --{name.replace('_', '-')}" for name in ABLATIONS]
    assert len(flags) >= 10
    assert not [flag for flag in flags if flag in shown["--help"]]
    assert [flag for flag in flags if flag in shown["--help-all"]] == flags
    assert "ablation switches:" not in shown["--help"]
    assert "ablation switches:" in shown["--help-all"]
    assert max(map(len, shown["--help-all"].splitlines())) <= 80


def test_a_hidden_switch_is_parsed_as_ever() -> None:
    args = build_parser().parse_args(["generate", "MODEL", "hi", "--no-governor", "--eviction", "lru"])
    config = options.engine_config(args)
    assert (config.governor, config.eviction) == (False, "lru")


@pytest.mark.parametrize("flag", ["--learn", "--no-learn"])
def test_a_flag_of_what_was_removed_changes_nothing_and_says_so(flag, capsys: pytest.CaptureFixture[str]) -> None:
    assert options.engine_config(parsed(flag)) == EngineConfig()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"Note: {flag} does nothing: the online learner was removed.\n")
    assert "learn" not in help_of("generate", "--help-all", capsys)


def test_the_flag_that_allowed_code_in_a_sandbox_is_no_alias_of_the_one_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["eval", "MODEL", "--human-eval", "--allow-code-execution"])
    assert ended.value.code == 2
    assert "--confirm-run-unsafe-code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], {}),
        (["--temperature", "0.7"], {"temperature": 0.7, "do_sample": True}),
        (["--top-k", "5", "--seed", "3"], {"top_k": 5, "do_sample": True}),
        (["--temperature", "0"], {"do_sample": False}),
        (["--no-do-sample"], {"do_sample": False}),
        (["--do-sample"], {"do_sample": True}),
        (["--repetition-penalty", "1.2"], {"repetition_penalty": 1.2}),
    ],
)
def test_sampling_says_only_what_was_asked(flags: list[str], told: dict) -> None:
    assert generate.sampling(parsed(*flags)) == told


@pytest.mark.parametrize("flags", [["--top-p", "0.9", "--no-do-sample"], ["--temperature", "0", "--do-sample"]])
def test_sampling_that_contradicts_itself_is_refused(flags: list[str]) -> None:
    with pytest.raises(PromptError, match="leave out"):
        generate.sampling(parsed(*flags))


class Piped(io.TextIOWrapper):
    """Standard input that is not a terminal."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))


def test_a_prompt_comes_from_the_line_a_file_or_a_pipe(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("naïve\n\n".encode())
    assert options.read_prompt("as it is\n", None) == "as it is\n"
    assert options.read_prompt(None, file) == "naïve\n"
    monkeypatch.setattr(sys, "stdin", Piped(b"piped\r\n"))
    assert options.read_prompt(None, None) == "piped"
    monkeypatch.setattr(sys, "stdin", Piped(b"dash"))
    assert options.read_prompt("-", None) == "dash"


def test_a_prompt_that_cannot_be_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(b"\n"))
    with pytest.raises(PromptError, match="empty"):
        options.read_prompt(None, None)
    monkeypatch.setattr(sys, "stdin", Piped(b"caf\xe9"))
    with pytest.raises(PromptError, match=r"UTF-8 text \(byte 3\)"):
        options.read_prompt("-", None)
    with pytest.raises(PromptError, match="cannot be read"):
        options.read_prompt(None, tmp_path / "absent")
    with pytest.raises(PromptError, match="one of them"):
        options.read_prompt("text", tmp_path)
    terminal = Piped(b"")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(PromptError, match="no prompt"):
        options.read_prompt(None, None)


@pytest.mark.parametrize(
    ("asked", "slot_bytes", "expected"), [(None, 73728, 2), (None, 2**23, 1), (1, 73728, 1), (3, 2**23, 3)]
)
def test_small_experts_have_two_readers_unless_asked_otherwise(asked, slot_bytes: int, expected: int) -> None:
    assert EngineConfig(reader_threads=asked).readers(slot_bytes) == expected


@pytest.mark.parametrize(
    ("asked", "environment", "usable", "expected"),
    [
        (None, {}, 2, 2),  # a container's quota
        (None, {}, 16, 4),  # torch's own choice, which may be less: of two threads of a core it takes one
        (None, {"OMP_NUM_THREADS": "4"}, 2, 4),
        (None, {"MKL_NUM_THREADS": "4"}, 2, 4),
        (3, {}, 2, 3),
        (3, {"OMP_NUM_THREADS": "4"}, 2, 3),
    ],
)
def test_torch_gets_the_threads_that_can_run(monkeypatch, asked, environment, usable, expected) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("foreroute.memory.host.usable_cpus", lambda: usable)
    torch.set_num_threads(4)
    options.apply_threads(argparse.Namespace(threads=asked))
    assert torch.get_num_threads() == expected


# The flags of each command beside the engine's, as its --help had them before this vocabulary. What a feature took
# with it is not among them: --before-attention (fit, score), --int8-share and --predictor (pack).
DOCUMENTED = {
    "bench": "batch debug dtype json new-tokens png prompt quick repeats revision rungs text threads",
    "chat": "debug do-sample dtype load max-new-tokens min-p no-history no-do-sample plain repetition-penalty seed "
    "system temperature threads top-k top-p",
    "demo": "debug dtype json max-new-tokens model threads",
    "eval": "batch context debug dtype held-out human-eval include-path json kinds limit lm-eval memory per-kind png "
    "policies revision seed suite text threads windows",
    "fit": "context debug dtype estimator estimator-epochs estimator-shrink estimator-widen force json memory "
    "no-resume on-policy out packed resume revision rows text threads tokens",
    "help": "",
    "list": "debug json",
    "pull": "debug json revision",
    "show": "debug json revision",
    "doctor": "debug json",
    "completion": "",
    "run": "debug do-sample dtype json max-new-tokens min-p no-do-sample quiet repetition-penalty revision seed system "
    "temperature threads top-k top-p",
    "rm": "debug json packed revision yes",
    "generate": "chat debug do-sample dtype file json max-new-tokens min-p no-chat no-do-sample quiet "
    "repetition-penalty revision seed system temperature threads top-k top-p trace",
    "pack": "context debug force json keep-partial memory no-resume out quant resume revision text threads windows",
    "plan": "ctx-size debug dtype json max-model-len max-num-seqs revision threads",
    "replay": "bandwidth chrome debug json memory model out partial seed token warm-up",
    "score": "context debug decode dtype json memory packed png predictor revision rows text threads tokens",
    "serve": "allowed-host api-key ctx-size debug dtype host insecure json max-model-len max-num-seqs max-waiting "
    "model no-ui port seed served-model-name temperature threads",
    "verify": "debug dtype json prompts reference revision threads tokens",
}
ENGINE = (
    "eviction prefetch predictor prefetch-prefill prefill-chunk learn no-learn policy deterministic no-deterministic "
    "prefetch-width governor no-governor cache no-cache hits-first no-hits-first reader-threads direct-io no-direct-io "
    "memory packed"
)
NOT_ON_BENCH = {
    "prefetch",
    "policy",
    "deterministic",
    "no-deterministic",
    "cache",
    "no-cache",
    "hits-first",
    "no-hits-first",
}


def test_every_flag_that_was_documented_is_still_accepted() -> None:
    commands = next(one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
    assert set(commands) == set(DOCUMENTED)
    for name, parser in commands.items():
        flags = set(DOCUMENTED[name].split())
        if name in ("bench", "chat", "demo", "eval", "generate", "plan", "run", "serve", "verify"):
            flags |= set(ENGINE.split()) - (NOT_ON_BENCH if name == "bench" else set())
        if name in ("chat", "generate", "plan", "run", "serve"):
            flags |= {"device", "control", "host-memory", "kv-tokens", "prefix-cache", "prefix-cache-dir"}
        known = {option for action in parser._actions for option in action.option_strings}
        assert {f"--{flag}" for flag in flags} <= known, name
