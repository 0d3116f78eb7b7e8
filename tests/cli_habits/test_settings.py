"""Flags that are set in the config file and the environment: who wins, what is named, and what is shown."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli import options
from foreroute.cli.main import build_parser
from foreroute.cli.settings.flags import settable

FILE = """\
threads = 3
memory = "8GiB"

[generate]
memory = "4GiB"
max-new-tokens = 20
governor = false

[serve]
port = 9000
api_key = ["file secret"]
served_model_name = ["a", "b"]

[models."org/big"]
memory = "25%"
packed = "q4_k"
temperature = 0.5

[models.large]
seed = 7

[aliases]
large = "/data/large.gguf"
"""


def settings_of(run: Any, *words: str) -> dict[str, dict[str, Any]]:
    ran = run(*words, "--print-config", "--json")
    assert (ran.code, ran.err) == (0, "")
    return {one["name"]: one for one in ran.json["settings"]}


def test_who_wins(run, config, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(FILE)
    found = settings_of(run, "generate", "MODEL", "--max-new-tokens", "5")
    assert found["max_new_tokens"] == {"name": "max_new_tokens", "value": 5, "source": "flag",
                                       "origin": "--max-new-tokens"}  # fmt: skip
    assert (found["threads"]["value"], found["threads"]["origin"]) == (3, f"{path}, line 1")
    assert (found["memory"]["value"], found["memory"]["origin"]) == ("4GiB", f"{path}, line 5, [generate]")
    assert (found["governor"]["value"], found["packed"]["source"]) == (False, "default")
    monkeypatch.setenv("FOREROUTE_MEMORY", "2GiB")
    monkeypatch.setenv("FOREROUTE_MAX_NEW_TOKENS", "6")
    monkeypatch.setenv("FOREROUTE_GENERATE_MAX_NEW_TOKENS", "7")
    monkeypatch.setenv("FOREROUTE_GOVERNOR", "yes")
    monkeypatch.setenv("FOREROUTE_SEED", "")
    found = settings_of(run, "generate", "org/big")
    assert (found["memory"]["value"], found["memory"]["origin"]) == ("2GiB", "FOREROUTE_MEMORY")
    assert (found["max_new_tokens"]["value"], found["governor"]["value"]) == (7, True)
    assert (found["seed"]["value"], found["packed"]["value"], found["temperature"]["value"]) == (None, "q4_k", 0.5)


def test_a_models_own_settings_win_over_the_commands(run, config) -> None:
    config(FILE)
    assert settings_of(run, "generate", "org/big")["memory"]["value"] == "25%"
    for name in ("large", "/data/large.gguf"):
        assert settings_of(run, "generate", name)["seed"]["value"] == 7, "an alias and what it stands for are one model"
    assert settings_of(run, "generate", "other")["seed"]["value"] is None
    assert settings_of(run, "serve", "-m", "org/big")["packed"]["value"] == "q4_k"


def test_what_is_set_reaches_the_command(config) -> None:
    config(FILE)
    args = build_parser().parse_args(["generate", "org/big", "hi", "--memory", "1GiB"])
    asked = options.engine_config(args)
    assert (asked.memory, asked.packed, asked.governor, args.temperature) == ("1GiB", "q4_k", False, 0.5)
    args = build_parser().parse_args(["serve", "m", "--api-key", "typed"])
    assert (args.port, args.api_key, args.served_model_name) == (9000, ["typed"], ["a", "b"])


def test_an_answer_is_as_the_file_has_it(run, tiny: Path, config) -> None:
    config(f'[models."{tiny}"]\nmax_new_tokens = 3\nthreads = 1\nquiet = true\nmemory = "50%"\n')
    ran = run("generate", tiny, "hi", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["figures"]["new_tokens"] == 3


def test_the_key_is_not_printed(run, config, monkeypatch: pytest.MonkeyPatch) -> None:
    config(FILE)
    monkeypatch.setenv("FOREROUTE_API_KEY", "the environment's")
    for words in (["--json"], []):
        ran = run("serve", "MODEL", "--print-config", *words)
        assert ran.code == 0
        assert "environment's" not in ran.out
        assert "(hidden)" in ran.out
        assert "FOREROUTE_API_KEY" in ran.out
    monkeypatch.delenv("FOREROUTE_API_KEY")
    assert "secret" not in run("serve", "MODEL", "--print-config").out
    config("[serve]\napi_key = [3.5, true]\n")
    assert "3.5" not in run("serve", "MODEL").err


def test_settings_are_shown_as_lines_without_any_argument(run, config) -> None:
    path = config(FILE)
    ran = run("generate", "--print-config")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"config file: {path}\n")
    lines = {line.split()[0]: line for line in ran.out.splitlines()[1:]}
    assert lines["memory"].endswith(f"4GiB  ({path}, line 5, [generate])")
    assert lines["governor"].split()[1] == "false"
    assert lines["seed"].split()[1:] == ["-", "(default)"]
    assert run("fit", "--print-config").code == 0, "also where a flag is required"
    path.unlink()
    assert f"there is none; it would be {path}" in run("generate", "--print-config").out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("memry = 1\n", "line 1: there is no setting 'memry' here. Did you mean memory?"),
        ("[generate]\n\nport = 1\n", "line 3, [generate]: there is no setting 'port' here."),
        ("[generat]\nseed = 1\n", "line 1: there is no section 'generat' here. Did you mean generate?"),
        ('[models.x]\nseeds = 1\n', "line 2, [models.x]: there is no setting 'seeds' here. Did you mean seed?"),
        ("[models]\nx = 1\n", "x must be a section"),
        ("seed = -1\n", "line 1: seed is -1: -1 is below 0."),
        ('top-k = "many"\n', "line 1: top_k is 'many': it must be a whole number."),
        ('governor = "perhaps"\n', "governor is 'perhaps': it must be true or false."),
        ('eviction = "fifo"\n', "choose one of lfu, lru."),
        ('policy = "sloppy"\n', "line 1: "),
        ("memory = 8\n", "Did you mean 8GiB?"),
        ("reader_threads = 99\n", "line 1: reader_threads is 99"),
        ("seed = [1, 2]\n", "it must be a text or a number."),
        ("seed = 1\nseed = 2\n", "is no TOML"),
        ("[pack]\nforce = true\n", "force is no setting: --force is typed each time."),
        ('regex = "a"\njson_schema = "b"\n', "exclude each other. Set one of them."),
        ('[aliases]\n"a/b" = "/x"\n', "is no name for a model"),
        ("[aliases]\na = 1\n", "line 2, [aliases]: a must be the text of a path"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_named_before_work(run, config, text: str, told: str) -> None:
    path = config(text)
    ran = run("generate", "MODEL-THAT-IS-NOT", "hi")
    assert ran.code == 2
    assert ran.err.startswith("foreroute: error: ")
    assert str(path) in ran.err
    assert told in ran.err
    assert run("generate", "--help").code == run("help").code == 0, "help does not need it"


def test_what_is_wrong_in_the_environment_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREROUTE_TEMPRATURE", "1")
    assert "Did you mean FOREROUTE_TEMPERATURE? Unset it." in run("generate", "MODEL", "hi").err
    monkeypatch.delenv("FOREROUTE_TEMPRATURE")
    monkeypatch.setenv("FOREROUTE_TOP_P", "2")
    assert "FOREROUTE_TOP_P: top_p is '2': 2 must be above 0, at most 1." in run("generate", "MODEL", "hi").err
    monkeypatch.delenv("FOREROUTE_TOP_P")
    # What Kubernetes sets for a service called foreroute.
    monkeypatch.setenv("FOREROUTE_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("FOREROUTE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("FOREROUTE_PORT_8000_TCP_ADDR", "10.0.0.1")
    assert settings_of(run, "serve", "MODEL")["port"]["source"] == "default"


def test_a_typed_flag_wins_over_one_that_it_excludes(config) -> None:
    config('regex = "a"\n')
    args = build_parser().parse_args(["generate", "m", "hi", "--grammar", "g"])
    assert (args.regex, args.grammar) == (None, Path("g"))
    assert build_parser().parse_args(["generate", "m", "hi"]).regex == "a"


def test_a_required_flag_may_be_set(config) -> None:
    config('[fit]\ntext = ["~/t.txt"]\n[eval]\nsuite = "builtin"\n')
    assert build_parser().parse_args(["fit", "m"]).text == [Path("~/t.txt").expanduser()]
    assert build_parser().parse_args(["eval", "m"]).suite == "builtin"


def test_another_file_or_none(run, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config("seed = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("seed = 2\n")
    monkeypatch.setenv("FOREROUTE_CONFIG", str(other))
    assert settings_of(run, "generate", "m")["seed"]["value"] == 2
    monkeypatch.setenv("FOREROUTE_CONFIG", "")
    assert settings_of(run, "generate", "m")["seed"]["value"] is None
    monkeypatch.setenv("FOREROUTE_CONFIG", str(tmp_path / "absent"))
    assert "cannot be read" in run("generate", "m", "hi").err


def test_without_settings_every_default_is_argparses_own() -> None:
    commands = next(one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
    words = {"fit": ["m", "--text", "t"], "score": ["m", "--text", "t"], "eval": ["m", "--suite", "builtin"],
             "replay": ["t"], "demo": [], "help": [], "list": [], "doctor": [], "completion": ["bash"]}  # fmt: skip
    for name, parser in commands.items():
        typed = words.get(name, ["m"])
        ours = vars(build_parser().parse_args([name, *typed]))
        for name_of, value in vars(parser.parse_args(typed)).items():
            assert name_of == "commands" or ours[name_of] == value, (name, name_of)
        assert name in ("help", "completion") or len(settable(parser)) >= 2, name
