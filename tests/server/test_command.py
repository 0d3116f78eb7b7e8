"""The command line of `foreroute serve`: what it says, what it refuses, how it stops."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli.commands import demo
from foreroute.cli.main import main
from tests.cli.harness import start
from tests.server.process import serving
from tests.server.sockets import post, read_until


def test_help_is_quick_and_narrow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for flag in (
        "--model", "--ctx-size", "--max-model-len", "--host", "--port", "--api-key", "--served-model-name", "--seed",
        "--temperature", "--max-num-seqs", "--memory", "--no-ui", "--insecure",
        "--allowed-host", "--tool-parser",
    ):  # fmt: skip
        assert flag in shown
    script = (
        "import sys\nfrom foreroute.cli.main import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--api-key", "has space"], "printable"),
        (["--host", "256.1.1.1", "--insecure"], "cannot be listened on"),
        (["-m", "MODEL"], "two models"),
        (["--tool-parser", "none such"], "hermes"),
        (["--allowed-host", "box", "--allowed-host", "https://box"], "not a host name"),
    ],
)
def test_refused_before_anything_is_loaded(
    flags: list[str], what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOREROUTE_API_KEY", raising=False)
    assert main(["serve", str(demo.find_model()), *flags]) == 2
    assert what in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve"]) == 2
    assert "no model" in capsys.readouterr().err
    assert main(["serve", "-m", "nowhere/at/all"]) == 2


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from foreroute.server.run import listen

    taken = listen("127.0.0.1", 0)
    assert main(["serve", str(demo.find_model()), "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another --port" in capsys.readouterr().err
    taken.close()


def test_what_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    child = start("serve", tmp_path, "--port", "0")
    out, err = child.communicate(timeout=100)
    assert child.returncode == 2
    assert b"foreroute: error: " in err
    assert b"ready" not in err
    assert out == b""


def test_a_context_without_room_ends_the_server() -> None:
    child = start("serve", demo.find_model(), "--port", "0", "--ctx-size", "400", "--kv-tokens", "300")
    out, err = child.communicate(timeout=100)
    assert (child.returncode, out) == (2, b"")
    assert b"400 tokens" in err
    assert b"--kv-tokens 300" in err


def test_flags_hold_and_ctrl_c_ends_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREROUTE_API_KEY", "sesame")
    flags = ("--served-model-name", "a", "b", "--ctx-size", "300", "--temperature", "1.2", "--seed", "3")
    flags += ("--kv-tokens", "500")
    with serving(*flags, "--max-waiting", "2", "--max-num-seqs", "1") as served:
        assert served.started["served"] == ["a", "b"]
        assert served.started["decided"]["context"].startswith("300 ")
        assert "500 tokens" in served.started["decided"]["requests"]
        assert served.started["decided"]["tools"].startswith("no: ")
        memory = served.started["memory"]
        assert memory["kv_bytes"] == 500 * memory["kv_bytes_per_token"]
        assert memory["total_bytes"] > sum(memory[name] for name in ("dense_bytes", "expert_bytes", "kv_bytes"))

        def ask(path: str, body: dict[str, Any] | None = None) -> Any:
            content = None if body is None else json.dumps(body).encode()
            headers = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(served.url + path, content, headers)) as answer:
                return json.load(answer)

        assert [model["id"] for model in ask("/v1/models")["data"]] == ["a", "b"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(served.url + "/v1/models")
        # More answers than could ever wait together are refused, and not put off for ever.
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("/v1/completions", {"prompt": ["a"] * 4, "max_tokens": 1})
        assert len(ask("/v1/completions", {"prompt": ["a"] * 3, "max_tokens": 1})["choices"]) == 3
        drawn = [ask("/v1/completions", {"prompt": "import", "max_tokens": 12}) for _ in range(2)]
        seeded = ask("/v1/completions", {"prompt": "import", "max_tokens": 12, "temperature": 1.2, "seed": 3})
        greedy = ask("/v1/completions", {"prompt": "import", "max_tokens": 12, "temperature": 0})
        assert drawn[0]["choices"] == drawn[1]["choices"] == seeded["choices"] != greedy["choices"]
        # It never ends by itself: the end token is out of the question.
        endless = {"prompt": "import", "stream": True, "max_tokens": 290, "logit_bias": {"4": -100, "0": -100}}
        connection = post(served.url, "/v1/completions", endless, key="sesame")
        read_until(connection, b'"text":"')
        served.child.send_signal(signal.SIGINT)
        assert b"shutting down" in read_until(connection, b"data: [DONE]")
        assert served.child.wait(30) == 0


def test_what_it_says(tmp_path: Path) -> None:
    child = start("serve", "-m", demo.find_model(), "--port", "0", "--threads", "1", "--predictor", "no")
    assert child.stderr is not None
    said: list[str] = []
    while not said or not said[-1].startswith("ready in "):
        line = child.stderr.readline().decode()
        assert line, said
        said.append(line)
    assert len(said) <= 15
    assert "http://127.0.0.1:" in said[1]
    assert any(line.startswith("  memory    at most ") and ", KV " in line for line in said)
    # SIGTERM, as systemd and docker send it, stops it as cleanly.
    child.send_signal(signal.SIGTERM)
    rest = child.communicate(timeout=30)[1].decode()
    assert child.returncode == 0
    assert rest == "foreroute serve  stopped\n"
