"""What is typed as for another tool, or misspelt, is answered with what it is called here."""

import argparse
from pathlib import Path

import pytest

from foreroute.cli.hints import _COMMANDS, _FLAGS, _SAID
from foreroute.cli.main import COMMANDS, build_parser


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("generate MODEL hi -n 5", "Did you mean --max-new-tokens?"),
        ("generate MODEL hi --max-tokens 5", "Did you mean --max-new-tokens?"),
        ("generate MODEL hi --n-predict=5", "Did you mean --max-new-tokens?"),
        ("generate MODEL hi --max_new_tokens 5", "Did you mean --max-new-tokens?"),
        ("generate MODEL -p hi", "write it after the model"),
        ("generate -m MODEL --prompt hi", "write it first"),
        ("generate MODEL hi -t 4", "Did you mean --threads?"),
        ("generate MODEL hi --temprature 1", "Did you mean --temperature?"),
        ("generate MODEL hi -ngl 99", "Did you mean --device?"),
        ("serve MODEL -c 4096", "Did you mean --ctx-size?"),
        ("serve MODEL --parallel 4", "Did you mean --max-num-seqs?"),
        ("chat MODEL --repeat-penalty 1.1", "Did you mean --repetition-penalty?"),
        ("chat MODEL --load-in-4bit", "pack MODEL --quant q4_k"),
        ("pack MODEL --outtype q8_0", "Did you mean --quant?"),
    ],
)
def test_a_flag_of_another_tool_is_answered_with_ours(run, typed: str, told: str) -> None:
    ran = run(*typed.split())
    assert ran.code == 2
    assert "unrecognized arguments: -" in ran.err
    assert told in ran.err
    assert ran.err.startswith(f"usage: foreroute {typed.split()[0]} "), "the usage of the command, not of all"


def test_a_flag_that_nothing_is_like_is_named_alone(run) -> None:
    ran = run("generate", "MODEL", "hi", "--xyzzy")
    assert (ran.code, "Did you mean" in ran.err) == (2, False)
    assert run("generate", "MODEL", "hi", "--xyzzy", "-n", "5").err.endswith("Did you mean --max-new-tokens?\n")


@pytest.mark.parametrize(("typed", "told"), [("cli", "generate or chat"), ("serv", "foreroute serve?")])
def test_a_command_of_another_tool_is_answered_with_ours(run, typed: str, told: str) -> None:
    ran = run(typed, "MODEL")
    assert ran.code == 2
    assert told in ran.err
    assert "There are: run, generate, chat" in run("xyzzy").err
    assert told in run("help", typed).err


def test_what_is_suggested_exists_and_what_is_answered_does_not() -> None:
    commands = next(one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
    flags = {
        name: {flag for one in parser._actions for flag in one.option_strings} for name, parser in commands.items()
    }
    everywhere = set().union(*flags.values())
    assert set(_FLAGS) <= everywhere
    assert not {other for others in _FLAGS.values() for other in others} & flags["generate"]
    assert not set(_SAID) & flags["generate"]
    assert not set(_COMMANDS) & set(COMMANDS)
    assert {meant.split()[0] for meant in _COMMANDS.values()} <= set(COMMANDS)


def test_bare_foreroute_is_an_overview(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["foreroute"])
    ran = run()
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == run("help").out
    assert max(map(len, ran.out.splitlines())) <= 80
    for name in COMMANDS:
        assert f"\n  {name} " in ran.out
    assert "foreroute chat foreroute-tiny" in ran.out


def test_help_of_a_command_is_its_own_help(run) -> None:
    assert run("help", "plan").out == run("plan", "--help").out


def test_the_help_of_generate_is_for_beginners(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = run("generate", "--help").out, run("generate", "--help-all").out
    assert len(short.splitlines()) <= 70
    for flag in ("--memory", "--packed", "--max-new-tokens", "--temperature", "--device", "--help-all"):
        assert f"\n  {flag}" in short
    for flag in ("--predictor", "--prefill-chunk", "--policy", "--math", "--dense", "--trace", "--kv-tokens"):
        assert f"\n  {flag}" not in short
        assert f"\n  {flag}" in whole
    assert "late hits" not in short
    assert "late hits" in whole
    for flag in ("--kv-tokens", "--policy"):
        assert f"\n  {flag}" in run("serve", "--help").out


def test_sizes_are_said_as_they_are_read(run, tiny: Path) -> None:
    assert "2**30" in run("generate", "--help").out.replace("\n", " ")
    ran = run("generate", tiny, "hi", "--memory", "8")
    assert ran.code == 2
    assert "Did you mean 8GiB?" in ran.err
