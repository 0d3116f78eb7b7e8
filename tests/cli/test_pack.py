"""`foreroute pack` in this process: where the store goes, when nothing is to be done, and what is never overwritten."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from foreroute.checkpoint import store_writer
from foreroute.checkpoint.records import STORE_NAME, partial_path, store_name
from foreroute.checkpoint.store_writer import claim_store
from foreroute.cli.commands import pack
from foreroute.kernels.ggml.interleaved import orders
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS

SIZE = f"{NUM_LAYERS * NUM_EXPERTS} experts"


def test_a_store_beside_the_checkpoint_is_found_by_itself(run, copied: Path) -> None:
    ran = run("pack", copied)
    assert ran.code == 0, ran.err
    assert f"Wrote {copied / STORE_NAME}: {SIZE}" in ran.out
    assert "used automatically" in ran.out
    assert "packing" in ran.err
    packed = run("generate", copied, "hello", "--json", "--memory", "25%", "--max-new-tokens", "5", "--threads", "1")
    plain = run("generate", copied, "hello", "--json", "--memory", "25%", "--max-new-tokens", "5", "--threads", "1",
                "--packed", "no")  # fmt: skip
    assert [ran.json["plan"]["source"] for ran in (packed, plain)] == ["packed", "safetensors"]
    assert packed.json["token_ids"] == plain.json["token_ids"]


def test_a_complete_store_is_left_alone(run, copied: Path) -> None:
    run("pack", copied)
    before = (copied / STORE_NAME).stat().st_mtime_ns
    ran = run("pack", copied)
    assert ran.code == 0
    assert "nothing to do" in ran.out
    assert (copied / STORE_NAME).stat().st_mtime_ns == before
    forced = run("pack", copied, "--force", "--json")
    assert (copied / STORE_NAME).stat().st_mtime_ns > before
    assert forced.json == {
        "path": str(copied / STORE_NAME),
        "store_bytes": (copied / STORE_NAME).stat().st_size,
        "experts": NUM_LAYERS * NUM_EXPERTS,
        "codec": "stored",
        "layout": "plain",
        "dense": None,
        "existed": False,
        "found_automatically": True,
        "layer_errors": None,
        "quality": None,
    }
    assert forced.err == ""


def test_a_store_elsewhere_is_named_for_later(run, copied: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = run("pack", copied, "--out", elsewhere)
    assert ran.code == 0
    assert f"Use it with --packed {elsewhere / STORE_NAME}" in ran.out
    assert not (copied / STORE_NAME).exists()


def test_what_is_no_store_of_this_model_is_not_overwritten(run, copied: Path) -> None:
    (copied / STORE_NAME).write_text("somebody's notes")
    ran = run("pack", copied)
    assert ran.code == 2
    assert "--force packs over it" in ran.err
    assert (copied / STORE_NAME).read_text() == "somebody's notes"
    assert run("pack", copied, "--force").code == 0
    assert run("pack", copied).code == 0


def test_a_full_disk_is_noticed_before_a_byte_is_written(run, copied: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    ran = run("pack", copied)
    assert ran.code == 2
    assert "needs 3.0 MiB" in ran.err
    assert "976.6 KiB free" in ran.err
    assert not partial_path(copied / STORE_NAME).exists()


def test_a_folder_that_is_not_there_is_named(run, copied: Path, tmp_path: Path) -> None:
    ran = run("pack", copied, "--out", tmp_path / "absent" / "store")
    assert ran.code == 2
    assert "absent" in ran.err
    assert "--out" in ran.err


def test_ctrl_c_before_packing_has_begun_leaves_nothing(run, copied: Path, monkeypatch) -> None:
    from foreroute.prepare import pack as packing

    def interrupted(table, path: Path, **options) -> int:
        partial_path(path).write_bytes(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "pack", interrupted)
    assert run("pack", copied).code == 130
    assert not partial_path(copied / STORE_NAME).exists()
    assert run("pack", copied, "--keep-partial").code == 130
    assert partial_path(copied / STORE_NAME).exists()


def test_quantised_experts_are_used_when_they_are_asked_for(run, copied: Path) -> None:
    ran = run("pack", copied, "--quant", "q8_0")
    assert ran.code == 0, ran.err
    assert f"Wrote {copied / store_name('q8_0')}: {SIZE}" in ran.out
    assert "--packed q8_0" in ran.out
    assert "Error of a layer's products" in ran.out
    short = ("--json", "--memory", "25%", "--max-new-tokens", "3", "--threads", "1")
    asked = run("generate", copied, "hello", *short, "--packed", "q8_0")
    assert asked.code == 0, asked.err
    assert (asked.json["plan"]["source"], asked.json["plan"]["stored_dtype"]) == ("packed", "q8_0")
    assert run("generate", copied, "hello", *short).json["plan"]["source"] == "safetensors"
    found = run("plan", copied, "--memory", "50%", "--packed", "q8_0", "--json")
    assert found.code == 0, found.err
    assert "nothing to do" in run("pack", copied, "--quant", "q8_0").out
    again = run("pack", copied, "--quant", "q8_0", "--force", "--json")
    assert again.json["codec"] == "q8_0"
    assert not again.json["found_automatically"]
    assert len(again.json["layer_errors"]) == NUM_LAYERS
    assert all(0 < error < 0.02 for error in again.json["layer_errors"])


def test_another_codec_is_not_overwritten(run, copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert run("pack", copied, "--quant", "q8_0", "--out", out).code == 0
    ran = run("pack", copied, "--out", out)
    assert ran.code == 2
    assert "holds q8_0 experts, not stored" in ran.err
    assert run("pack", copied, "--quant", "q4_0", "--out", out, "--force").code == 0
    assert run("generate", copied, "hello", "--packed", out, "--max-new-tokens", "2").code == 0


def test_names_of_earlier_versions(run, copied: Path) -> None:
    """Rows of 64 weights are no whole blocks of q4_k."""
    for old, new in (("int8", "q8_0"), ("int4", "q4_1"), ("int4-g128", "q4_1")):
        ran = run("pack", copied, "--quant", old, "--force")
        assert ran.code == 0, ran.err
        assert f"--quant {old} is {new} now" in ran.err
        assert ("whole blocks of 256" in " ".join(ran.err.split())) == (new == "q4_1")
        assert f"Wrote {copied / store_name(new)}" in ran.out
    assert run("pack", copied, "--quant", "int4", "--force", "--json").err == ""


def test_rows_that_are_no_whole_blocks(run, copied: Path) -> None:
    ran = run("pack", copied, "--quant", "q4_k")
    assert ran.code == 2
    assert "rows have 64 weights" in ran.err
    assert "(llama.cpp takes q5_0 in its place)" in ran.err
    assert [path for path in copied.iterdir() if ".foreroute" in path.name] == []


def test_a_second_pack_leaves_the_first_alone(run, copied: Path, monkeypatch) -> None:
    """It says in one line who is at work; and neither an error nor Ctrl-C of the second takes anything away."""
    path = copied / STORE_NAME
    with claim_store(path) as claim:
        os.write(claim.fd, b"the first one's")
        for flags in ((), ("--force",), ("--quant", "q8_0", "--out", path)):
            ran = run("pack", copied, *flags)
            assert ran.code == 2
            said = ran.err.splitlines()[-1]
            assert "being written by another `foreroute pack`" in said
            assert f"(process {os.getpid()})" in said
            assert partial_path(path).read_bytes() == b"the first one's"
        with monkeypatch.context() as patched:
            patched.setattr(store_writer, "claim_store", interrupted)
            assert run("pack", copied).code == 130
        assert partial_path(path).read_bytes() == b"the first one's"
    assert run("pack", copied).code == 0


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_store_that_another_pack_has_just_finished(run, copied: Path, monkeypatch) -> None:
    """Between looking for it and the right to write it: it is there, and nothing is to be done."""
    claim = store_writer.claim_store

    def late(path: Path) -> object:
        monkeypatch.setattr(store_writer, "claim_store", claim)
        assert run("pack", copied).code == 0
        return claim(path)

    monkeypatch.setattr(store_writer, "claim_store", late)
    ran = run("pack", copied)
    assert ran.code == 0
    assert "nothing to do" in ran.out
    assert sorted(path.name for path in copied.iterdir() if STORE_NAME in path.name) == [STORE_NAME]


def test_nothing_to_do_needs_no_right_to_write(run, copied: Path, monkeypatch) -> None:
    """As in a folder that is mounted read-only."""
    run("pack", copied)
    monkeypatch.setattr(store_writer, "claim_store", interrupted)
    assert "nothing to do" in run("pack", copied).out


def test_a_layout_is_chosen_once(run, copied: Path) -> None:
    """Another one than was asked for is not taken for it; "auto" takes whatever this machine reads."""
    quant = ("--quant", "q4_0", "--threads", "1")
    if "Q4_0" not in orders():
        pytest.skip("ggml has no other layout of Q4_0 on this CPU")
    assert run("pack", copied, *quant, "--layout", "plain", "--json").json["layout"] == "plain"
    assert run("pack", copied, *quant, "--json").json["existed"]
    refused = run("pack", copied, *quant, "--layout", "interleaved")
    assert refused.code == 2
    assert "another layout than --layout interleaved" in refused.err
    assert "--force packs over it" in refused.err
    made = run("pack", copied, *quant, "--layout", "interleaved", "--force")
    assert "eight rows of Q4_0 side by side" in " ".join(made.out.split())
    assert run("pack", copied, *quant, "--layout", "plain").code == 2
    again = run("pack", copied, *quant, "--json").json
    assert (again["existed"], again["layout"]) == (True, "interleaved")
    plan = run("plan", copied, "--packed", "q4_0", "--threads", "1")
    assert "packed store, eight rows side by side" in " ".join(plan.out.split())


def test_a_layout_that_no_matrix_can_have(run, copied: Path) -> None:
    for quant in ((), ("--quant", "q8_0")):
        ran = run("pack", copied, *quant, "--layout", "interleaved")
        assert ran.code == 2
        assert "no matrix of the experts is such a one. Leave --layout out" in " ".join(ran.err.split())
    assert not list(copied.glob("*.foreroute*"))


@pytest.mark.parametrize("auto", ["plain", "interleaved"])
def test_the_default_layout(run, copied: Path, monkeypatch, auto: str) -> None:
    monkeypatch.setattr(pack, "AUTO_LAYOUT", auto)
    expected = auto if "Q4_0" in orders() else "plain"
    assert run("pack", copied, "--quant", "q4_0", "--threads", "1", "--json").json["layout"] == expected


def test_a_store_of_another_machine(run, copied: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("foreroute.kernels.ggml.interleaved.orders", lambda: {"Q4_0": "another"})
        if "Q4_0" not in orders():
            pytest.skip("nothing is converted on this CPU")
        run("pack", copied, "--quant", "q4_0", "--layout", "interleaved", "--threads", "1")
    ran = run("pack", copied, "--quant", "q4_0", "--threads", "1")
    assert ran.code == 2
    assert "another CPU or build of ggml" in " ".join(ran.err.split())
