"""`foreroute pack` with --quant and --dense in this process: what it costs on a text, and what is said and refused."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foreroute.checkpoint.records import partial_path, store_name
from foreroute.model.build.dense_blocks import QuantisedMatrices
from foreroute.verification.distance import MOST_KL
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS

TOTAL = NUM_LAYERS * NUM_EXPERTS
SHORT = ("--windows", "3", "--context", "40", "--threads", "1")
# Four projections of each layer, embedding and output.
NUM_MATRICES = 4 * NUM_LAYERS + 2
TOKENS = ("--memory", "25%", "--max-new-tokens", "4", "--threads", "1", "--json")
ODD_ONE = "model.layers.2.self_attn.o_proj.weight"


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


def test_it_is_written_named_and_shown(run, copied: Path) -> None:
    path = copied / store_name("q4_0", "q8_0")
    ran = run("pack", copied, "--quant", "q4_0", "--dense", "q8_0")
    assert ran.code == 0, ran.err
    said = ran.out.replace("\n", " ")
    assert f"Wrote {path}: {TOTAL} experts, " in said
    assert f", dense weights in q8_0 ({NUM_MATRICES} matrices, " in said
    assert "Use it with --packed q4_0-dense-q8_0" in said
    assert "nothing to do" in run("pack", copied, "--quant", "q4_0", "--dense", "q8_0").out
    found = run("pack", copied, "--quant", "q4_0", "--dense", "q8_0", "--json").json
    assert (found["codec"], found["existed"], found["found_automatically"]) == ("q4_0", True, False)
    assert found["dense"] == {"type": "q8_0", "matrices": NUM_MATRICES, "bytes": found["dense"]["bytes"]}
    made = run("generate", copied, "hello", *TOKENS, "--packed", "q4_0-dense-q8_0").json
    assert (made["plan"]["stored_dtype"], made["plan"]["dense"], made["plan"]["source"]) == ("q4_0", "q8_0", "packed")
    assert made["plan"]["dense_bytes"] >= found["dense"]["bytes"]
    planned = run("plan", copied, "--memory", "50%", "--packed", "q4_0-dense-q8_0")
    assert planned.code == 0, planned.err
    assert "q8_0, always in RAM" in planned.out
    assert "q8_0, always" not in run("plan", copied, "--memory", "50%").out


def test_without_quant_experts_stay_as_they_are(run, copied: Path) -> None:
    assert run("pack", copied, "--dense", "q8_0").code == 0
    assert (copied / store_name("stored", "q8_0")).exists()
    assert run("generate", copied, "hello", *TOKENS).json["plan"]["dense"] == "stored", "the output would change"
    made = run("generate", copied, "hello", *TOKENS, "--packed", "dense-q8_0").json
    at_load = run("generate", copied, "hello", *TOKENS, "--dense", "q8_0").json
    assert made["token_ids"] == at_load["token_ids"]
    assert made["plan"]["stored_dtype"] == "F32"


def test_its_price_on_a_text(run, copied: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8)
    flags = ("--text", text, "--windows", "2", "--context", "40", "--threads", "1")
    ran = run("pack", copied, "--dense", "q4_0", *flags)
    assert ran.code == 0, ran.err
    assert "reading in dense-q4_0" in ran.err
    priced = run("pack", copied, "--dense", "q4_0", *flags, "--json").json["quality"]
    assert 0 < abs(priced["perplexity_delta"]) < 0.5
    at_load = run("eval", copied, *flags, "--dense", "q4_0", "--json").json["bits_per_char"]["all"]
    assert priced["packed"]["bits_per_char"] == pytest.approx(at_load, abs=1e-9)


def test_what_is_refused(run, copied: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("q4_k_m", "int8", "stored"):
        ran = run("pack", copied, "--dense", name)
        assert ran.code == 2
        assert "invalid choice" in ran.err
        assert "q6_k" in ran.err
    ran = run("pack", copied, "--dense", "q4_k")
    assert ran.code == 2
    assert "--dense q4_k cannot take" in ran.err.replace("\n", " ")
    out = tmp_path / "store"
    assert run("pack", copied, "--dense", "q8_0", "--out", out).code == 0
    for flags, said in (((), "q8_0, not none"), (("--dense", "q4_0"), "q8_0, not q4_0")):
        ran = run("pack", copied, *flags, "--out", out)
        assert ran.code == 2
        assert said in ran.err.replace("\n", " ")
        assert "--force packs over it" in ran.err.replace("\n", " ")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 2**20 + 20_000))
    ran = run("pack", copied, "--dense", "q8_0")
    assert ran.code == 2
    assert "free. Make room" in ran.err.replace("\n", " ")
    assert not partial_path(copied / store_name("stored", "q8_0")).exists()


@pytest.fixture
def verified(run, copied: Path, tmp_path: Path) -> Any:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The ship came into the harbour.\n1 + 1 =\n")

    def verifying(packed: str, *flags: str) -> Any:
        threads = torch.get_num_threads()
        asked = ("--packed", packed, "--prompts", prompts, "--tokens", "8", "--threads", "1")
        ran = run("verify", copied, *asked, *flags)
        torch.set_num_threads(threads)
        return ran

    return verifying


@pytest.mark.parametrize("quant", ["", "q8_0"])
def test_verify(run, copied: Path, verified: Any, quant: str) -> None:
    assert run("pack", copied, "--dense", "q8_0", *(["--quant", quant] if quant else [])).code == 0
    packed = f"{quant}-dense-q8_0".removeprefix("-")
    for flags in (("--reference", "resident"), ("--reference", "on-demand"), ("--math", "torch")):
        ran = verified(packed, *flags, "--json")
        assert ran.code == 0, ran.out + ran.err
        assert (ran.json["same"], ran.json["plan"]["dense"]) == (True, "q8_0")
        assert ran.json["evictions"] > 0
        if flags[0] == "--math":
            assert ran.json["beside_torch"] is None
        else:
            assert ran.json["reference"] == flags[1]
            assert 0 < ran.json["beside_torch"]["median_kl"] < MOST_KL
    said = " ".join(verified(packed).out.split())
    assert "its dense weights, and its experts that were used, are what packing the checkpoint again makes" in said
    assert "the same kernels, all experts in memory" in said


def test_verify_names_a_matrix_that_is_another(run, copied: Path, verified: Any, monkeypatch: Any) -> None:
    """Written so by `pack`, with a checksum that is right: only the checkpoint can tell."""
    read = QuantisedMatrices.read

    def other(self: Any, name: str, state: Any) -> Any:
        matrix = read(self, name, state)
        if name == ODD_ONE:
            matrix.blocks[3, 7] ^= 1
        return matrix

    with monkeypatch.context() as patched:
        patched.setattr(QuantisedMatrices, "read", other)
        assert run("pack", copied, "--dense", "q8_0").code == 0
    for flags in ((), ("--math", "torch")):
        first = verified("dense-q8_0", *flags, "--json").json["first_difference"]
        assert (first["part"], first["moe_layer"], first["tensors"]) == ("packed dense", None, [ODD_ONE])
    ran = verified("dense-q8_0")
    assert ran.code == 1
    said = " ".join(ran.out.split())
    assert "the packed store's dense weights are not what packing the checkpoint again makes" in said
    assert f"other values than the reference: {ODD_ONE}." in said
    assert "pack again" in said


def test_an_expert_that_is_another_is_named_too(run, copied: Path, verified: Any, monkeypatch: Any) -> None:
    """Of a store whose experts are the checkpoint's bytes."""
    from foreroute.prepare import pack

    unchanged = pack._unchanged

    def other(key: int, slot: memoryview) -> Any:
        if key == NUM_EXPERTS + 5:
            slot[40] ^= 1
        return unchanged(key, slot)

    with monkeypatch.context() as patched:
        patched.setattr(pack, "_unchanged", other)
        assert run("pack", copied, "--dense", "q8_0").code == 0
    first = verified("dense-q8_0", "--json").json["first_difference"]
    assert (first["part"], first["moe_layer"], first["experts"]) == ("experts", 1, [5])


def test_ctrl_c_among_the_dense_matrices(run, copied: Path, monkeypatch: Any) -> None:
    from foreroute.prepare.quantise import DenseQuantiser

    blocks, asked = DenseQuantiser.blocks, list[str]()

    def interrupted(self: Any, name: str) -> memoryview:
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return blocks(self, name)

    path = copied / store_name("q8_0", "q8_0")
    flags = ("pack", copied, "--quant", "q8_0", "--dense", "q8_0")
    with monkeypatch.context() as patched:
        patched.setattr(DenseQuantiser, "blocks", interrupted)
        assert run(*flags).code == 130
        assert not list(copied.glob("*.partial"))
        asked.clear()
        assert run(*flags, "--keep-partial").code == 130
    assert partial_path(path).exists()
    ran = run(*flags)
    assert ran.code == 0, ran.err
    said = " ".join(ran.err.split())
    assert f"{TOTAL + 2} of {TOTAL + NUM_MATRICES} experts and dense matrices are done" in said
    whole = path.read_bytes()
    assert run(*flags, "--force").code == 0
    assert path.read_bytes() == whole
