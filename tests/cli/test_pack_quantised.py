"""`foreroute pack --quant` in this process: what a codec costs on a text."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from foreroute.checkpoint.records import store_name
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS

TOTAL = NUM_LAYERS * NUM_EXPERTS
SHORT = ("--windows", "3", "--context", "40", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8)
    return path


def test_a_pack_is_priced_on_text(run, copied: Path, text: Path) -> None:
    ran = run("pack", copied, "--quant", "q4_0", "--text", text, *SHORT)
    assert ran.code == 0, ran.err
    assert "120 tokens" in ran.out
    for name in ("as stored", "q4_0", "difference", "perplexity", "bits/char"):
        assert name in ran.out
    assert "reading as stored" in ran.err
    assert "reading in q4_0" in ran.err
    # A store that is there is priced, and not packed again.
    before = (copied / store_name("q4_0")).stat().st_mtime_ns
    again = run("pack", copied, "--quant", "q4_0", "--text", text, *SHORT, "--json")
    assert again.json["existed"]
    assert (copied / store_name("q4_0")).stat().st_mtime_ns == before
    found = again.json["quality"]
    assert again.err == ""
    stored, packed = found["stored"], found["packed"]
    assert (found["tokens"], found["chars"]) == (120, 120), "every byte is a token"
    assert stored["perplexity"] == pytest.approx(2 ** stored["bits_per_char"])
    assert found["perplexity_delta"] == pytest.approx(packed["perplexity"] / stored["perplexity"] - 1)
    assert found["bits_per_char_delta"] == pytest.approx(
        math.log(packed["perplexity"]) / math.log(stored["perplexity"]) - 1
    )
    assert 0 < abs(found["perplexity_delta"]) < 0.2
    for one in (stored, packed):
        assert one["by_file"] == {str(text): pytest.approx(one["bits_per_char"])}


def test_the_figures_are_those_of_eval(run, copied: Path, text: Path) -> None:
    """The same windows through `foreroute eval`, with the store and without."""
    priced = run("pack", copied, "--quant", "q8_0", "--text", text, *SHORT, "--json").json["quality"]
    for packed, mine in (("no", "stored"), ("q8_0", "packed")):
        ran = run("eval", copied, "--text", text, *SHORT, "--packed", packed, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["bits_per_char"][str(text)] == pytest.approx(priced[mine]["by_file"][str(text)], abs=1e-9)
    assert abs(priced["perplexity_delta"]) < 0.01


def test_a_full_disk_is_noticed_before_text_is_read(run, copied: Path, text: Path, monkeypatch) -> None:
    from foreroute.evals import quantised

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(quantised, "read", lambda *args, **options: pytest.fail("the text was read"))
    ran = run("pack", copied, "--quant", "q4_0", "--text", text, *SHORT)
    assert ran.code == 2
    assert "97.7 KiB free" in ran.err
    assert "Nothing was written" in ran.err


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (("--text", "TEXT"), "Without --quant"),
        (("--quant", "mixed"), "invalid choice: 'mixed'"),
        (("--quant", "q4_0", "--text", "TEXT", "--context", "5000"), "The text"),
        (("--quant", "q4_0", "--text", "gone.txt"), "gone.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_work(run, copied: Path, text: Path, flags, fragment) -> None:
    ran = run("pack", copied, *(str(text) if flag == "TEXT" else flag for flag in flags))
    assert ran.code == 2
    assert fragment in ran.err
    assert [path for path in copied.iterdir() if ".foreroute" in path.name] == []
