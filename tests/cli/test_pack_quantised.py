"""`foreroute pack --quant` in this process: what a codec costs on a text, and which experts get more bits."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore, partial_path, store_name
from foreroute.model.skeleton import outline
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS

TOTAL = NUM_LAYERS * NUM_EXPERTS
SHORT = ("--windows", "3", "--context", "40", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8)
    return path


def test_a_pack_is_priced_on_text(run, copied: Path, text: Path) -> None:
    ran = run("pack", copied, "--quant", "int4", "--text", text, *SHORT)
    assert ran.code == 0, ran.err
    assert "120 tokens" in ran.out
    for name in ("as stored", "int4", "difference", "perplexity", "bits/char"):
        assert name in ran.out
    assert "reading as stored" in ran.err
    assert "reading in int4" in ran.err
    # A store that is there is priced, and not packed again.
    before = (copied / store_name("int4")).stat().st_mtime_ns
    again = run("pack", copied, "--quant", "int4", "--text", text, *SHORT, "--json")
    assert again.json["was_there"]
    assert (copied / store_name("int4")).stat().st_mtime_ns == before
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
    priced = run("pack", copied, "--quant", "int8", "--text", text, *SHORT, "--json").json["quality"]
    for packed, mine in (("no", "stored"), ("int8", "packed")):
        ran = run("eval", copied, "--text", text, *SHORT, "--packed", packed, "--dtype", "bfloat16", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["bits_per_char"][str(text)] == pytest.approx(priced[mine]["by_file"][str(text)], abs=1e-9)
    assert abs(priced["perplexity_delta"]) < 0.01


def test_mixed_bits_by_what_the_text_uses(run, copied: Path, text: Path) -> None:
    ran = run("pack", copied, "--quant", "mixed", "--text", text, *SHORT, "--json")
    assert ran.code == 0, ran.err
    choice = ran.json["choice"]
    assert (choice["int8_share"], choice["by"]) == (0.25, "text")
    chosen = {name: set(experts) for name, experts in choice["int8"].items()}
    assert sum(map(len, chosen.values())) == TOTAL // 4
    assert 0.25 < choice["share_of_uses"] < 1
    assert choice["uses"] == 3 * 40 * 2 * NUM_LAYERS, "each token uses two experts of each layer"
    table = outline(copied, read_index(copied)).table
    store = PackedStore(copied / store_name("mixed"), table)
    assert {layer.name: set(layer.others) for layer in store.table.layers} == chosen
    told = run("pack", copied, "--quant", "mixed")
    assert f"In int8: {TOTAL // 4} experts" in told.out
    assert "uses that the text counted" in " ".join(told.out.split())
    asked = run("generate", copied, "hi", "--packed", "mixed", "--dtype", "bfloat16", "--memory", "50%", "--json",
                "--max-new-tokens", "3", "--threads", "1")  # fmt: skip
    assert asked.json["plan"]["stored_dtype"] == "mixed"


def test_mixed_bits_by_a_fit(run, copied: Path, text: Path) -> None:
    """The fit beside the model is found, and no text is needed."""
    fitted = run("fit", copied, "--text", text, "--context", "40", "--rows", "2", "--threads", "1")
    assert fitted.code == 0, fitted.err
    ran = run("pack", copied, "--quant", "mixed", "--int8-share", "12.5%", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["choice"]["by"].endswith(".safetensors")
    assert sum(map(len, ran.json["choice"]["int8"].values())) == TOTAL // 8
    assert ran.json["quality"] is None
    other = run("pack", copied, "--quant", "mixed", "--int8-share", "50%")
    assert other.code == 2
    assert "12.5 % of its experts in int8, not 50 %. --force packs over it" in other.err


def test_mixed_bits_need_to_know_what_is_used(run, copied: Path) -> None:
    ran = run("pack", copied, "--quant", "mixed")
    assert ran.code == 2
    assert "foreroute fit" in ran.err
    assert "--text FILE" in ran.err
    assert not partial_path(copied / store_name("mixed")).exists()


def test_a_full_disk_is_noticed_before_uses_are_counted(run, copied: Path, text: Path, monkeypatch) -> None:
    from foreroute.evals import quantised

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(quantised, "read", lambda *args, **options: pytest.fail("the text was read"))
    ran = run("pack", copied, "--quant", "mixed", "--text", text, *SHORT)
    assert ran.code == 2
    assert "97.7 KiB free" in ran.err
    assert "Nothing was written" in ran.err


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (("--text", "TEXT"), "Without --quant"),
        (("--quant", "int4", "--int8-share", "25%"), "--int8-share belongs to --quant mixed"),
        (("--quant", "mixed", "--int8-share", "120%"), "between 0 and 100 %"),
        (("--quant", "mixed", "--int8-share", "much"), "much"),
        (("--quant", "int4", "--text", "TEXT", "--context", "5000"), "The text"),
        (("--quant", "int4", "--text", "gone.txt"), "gone.txt cannot be read"),
        (("--quant", "mixed", "--int8-share", "0.1%", "--text", "TEXT"), "0.1 % of 64 experts is none of them"),
    ],
)
def test_what_cannot_be_is_refused_before_work(run, copied: Path, text: Path, flags, fragment) -> None:
    ran = run("pack", copied, *(str(text) if flag == "TEXT" else flag for flag in flags))
    assert ran.code == 2
    assert fragment in ran.err
    assert [path for path in copied.iterdir() if ".foreroute" in path.name] == []


def test_a_pack_that_was_stopped_keeps_its_choice(run, copied: Path, text: Path, monkeypatch) -> None:
    """It goes on with the experts that were chosen, though other text would choose others, and reads no text again."""
    from foreroute.prepare import pack as packing

    original = packing._copy_all

    def stopping(table, keys, writer, transfer, slots, progress, quantiser) -> None:
        original(table, keys[:9], writer, transfer, slots, progress, quantiser)
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(packing, "_copy_all", stopping)
        ran = run("pack", copied, "--quant", "mixed", "--text", text, *SHORT, "--keep-partial")
    assert ran.code == 130
    assert "goes on there" in ran.err
    again = run("pack", copied, "--quant", "mixed")
    assert again.code == 0, again.err
    assert f"Continuing a partial file: 9 of {TOTAL} experts are there" in " ".join(again.err.split())
    assert "uses that the text counted" in " ".join(again.out.split())
