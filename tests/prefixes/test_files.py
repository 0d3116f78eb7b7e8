"""generation/prefix_files.py: a server that starts again has what the last one kept, and nothing of another model."""

import logging
import threading
from pathlib import Path

import pytest
import torch

from foreroute.batching.beginnings import Beginnings
from foreroute.errors import ForerouteError
from foreroute.generation.kept_layers import Segment
from foreroute.generation.prefix_files import PrefixFiles, StoredNode
from tests.batching.test_engine import ask
from tests.prefixes.test_beginnings import SYSTEM, ids_of

MOST = 10**9


def node(ids: list[int], start: int = 0, used: int = 0) -> StoredNode:
    states = torch.tensor(ids[start:], dtype=torch.bfloat16).reshape(1, 1, -1, 1)
    return StoredNode(tuple(ids), start, Segment([{"keys": states, "values": -states}]), None, used)


def read(files: PrefixFiles) -> list[tuple[int, ...]]:
    return [one.ids for one in files.read(torch.device("cpu"))]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def test_a_restarted_server_goes_on_with_every_conversation(model, engine_of, tmp_path: Path) -> None:
    """With the bits of one that was never stopped."""
    engine, stays = engine_of(model, max_num_seqs=2, prefix_folder=tmp_path), engine_of(model, max_num_seqs=2)
    system = ids_of(model, SYSTEM, 1)
    texts = [[*system, *ids_of(model, 30, 10 + at)] for at in range(3)]
    answers = [ask(one, ids, 4).wait() for ids in texts for one in (stays, engine)][1::2]
    kept = engine.state().prefix_bytes
    engine.close()
    again = engine_of(model, max_num_seqs=2, prefix_folder=tmp_path)
    assert again.state().prefix_bytes == kept > 0
    for ids, first in zip(texts, answers, strict=True):
        following = [*ids, *first.tokens, *ids_of(model, 5, 3)]
        resumed, went_on = (ask(one, following, 3).wait() for one in (again, stays))
        assert resumed.end.cached_tokens == went_on.end.cached_tokens == len(ids) + 3
        assert [(step.token_id, step.logprob) for step in resumed.steps] == [
            (step.token_id, step.logprob) for step in went_on.steps
        ]
    assert ask(again, [*system, *ids_of(model, 9, 77)], 1).wait().end.cached_tokens == SYSTEM


def test_what_is_damaged_is_computed_again_and_said(model, engine_of, tmp_path: Path, caplog) -> None:
    ids = ids_of(model, SYSTEM, 1)
    engine = engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    first = ask(engine, ids, 4).wait()
    engine.close()
    for path in stored(tmp_path):
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    assert "its checksum is wrong" in caplog.text
    again = ask(engine, ids, 4).wait()
    assert (again.end.cached_tokens, again.tokens) == (0, first.tokens)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"", lambda raw: raw.replace(b"ids", b"idz")])
def test_files_of_any_bytes_are_left_out(tmp_path: Path, damage, caplog) -> None:
    files = PrefixFiles(tmp_path, "model", MOST)
    files.write([node([1, 2, 3]), node([4, 5])])
    (path,) = (one for one in stored(tmp_path) if one.name.startswith("3-"))
    path.write_bytes(damage(path.read_bytes()))
    assert read(files) == [(4, 5)]
    assert path.name in caplog.text


def test_another_model_reads_nothing_of_it(tmp_path: Path) -> None:
    files, other = PrefixFiles(tmp_path, "model", MOST), PrefixFiles(tmp_path, "fine-tune", MOST)
    files.write([node([1, 2, 3])])
    assert read(other) == []
    # Nor where a file was moved.
    (path,) = stored(tmp_path)
    path.rename(next(one for one in tmp_path.iterdir() if one != path.parent) / path.name)
    assert read(other) == []


def test_what_the_tree_has_dropped_is_removed(tmp_path: Path) -> None:
    files = PrefixFiles(tmp_path, "model", MOST)
    files.write([node([1, 2, 3]), node([1, 2, 3, 4], 3)])
    before = {path: path.stat().st_mtime_ns for path in stored(tmp_path)}
    files.write([node([1, 2, 3]), node([5])])
    assert read(files) == [(5,), (1, 2, 3)]
    assert sum(path.exists() and path.stat().st_mtime_ns == at for path, at in before.items()) == 1, "written once"


def test_the_folder_is_bounded_over_all_models(tmp_path: Path) -> None:
    old = PrefixFiles(tmp_path, "old", MOST)
    old.write([node([at] * 100) for at in range(1, 9)])
    new = PrefixFiles(tmp_path, "new", 3000)
    new.write([node([1, 2])])
    assert len(read(old)) == 8, "another process has them"
    assert read(new) == [], "and there is no room beside them"
    old.close()
    new.write([node([1, 2])])
    assert sum(path.stat().st_size for path in stored(tmp_path)) <= 3000
    assert read(new) == [(1, 2)]


def test_two_servers_do_not_share_a_models_files(model, engine_of, tmp_path: Path) -> None:
    engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    with pytest.raises(ForerouteError, match=r"in use by another server.*--prefix-cache-dir"):
        engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ForerouteError, match=r"file cannot be written.*--prefix-cache-dir"):
        PrefixFiles(tmp_path / "file", "model", MOST)


def test_the_identity_is_of_weights_and_numbers(checkpoints, load, tmp_path: Path) -> None:
    asked = {"prefix_cache_dir": str(tmp_path)}
    one, same = (load(checkpoints.get("qwen3_moe"), memory, **asked) for memory in ("50%", "100%"))
    others = [load(checkpoints.get("qwen3_moe", **other), "50%", **asked) for other in ({"seed": 1}, {"dtype": "bf16"})]
    assert one.foreroute.plan.identity == same.foreroute.plan.identity != ""
    assert len({model.foreroute.plan.identity for model in (one, *others)}) == 3


def test_what_bits_depend_on_is_in_the_identity(checkpoints, load, tmp_path: Path, monkeypatch) -> None:
    def identity(**more) -> str:
        return load(checkpoints.get("qwen3_moe"), "50%", prefix_cache_dir=str(tmp_path), **more).foreroute.plan.identity

    found = [identity(), identity(attn_implementation="eager"), identity(prefill_chunk=32)]
    monkeypatch.setattr("foreroute.__version__", "0.0.9")
    found.append(identity())
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "of another machine")
    found.append(identity())
    assert len(set(found)) == 5


def test_reading_ends_at_its_bound(tmp_path: Path, monkeypatch) -> None:
    files, opened = PrefixFiles(tmp_path, "model", MOST), []
    files.write([node([at] * (at * 10)) for at in range(1, 9)])
    own = PrefixFiles._read
    monkeypatch.setattr(PrefixFiles, "_read", lambda self, path, device: opened.append(path) or own(self, path, device))
    # Four bytes for a token: 10 + 20 + 30 tokens fit.
    assert [len(one.ids) for one in files.read(torch.device("cpu"), 4 * 65)] == [10, 20, 30]
    assert len(opened) == 3


def test_room_is_made_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    old = PrefixFiles(tmp_path, "old", MOST)
    old.write([node([at] * 1000) for at in range(1, 9)])
    old.close()
    most, sizes = sum(path.stat().st_size for path in stored(tmp_path)), []
    new = PrefixFiles(tmp_path, "new", most)
    packed = PrefixFiles._packed

    def noted(self: PrefixFiles, one: StoredNode):
        sizes.append(sum(path.stat().st_size for path in stored(tmp_path)))
        return packed(self, one)

    monkeypatch.setattr(PrefixFiles, "_packed", noted)
    new.write([node([at] * 1000) for at in range(1, 4)])
    assert len(read(new)) == len(sizes) == 3
    assert max(sizes) + max(path.stat().st_size for path in stored(tmp_path)) <= most


def test_what_was_used_last_stays_longest_after_a_restart(model, engine_of, tmp_path: Path) -> None:
    engine = engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    texts = [ids_of(model, 40, at) for at in range(3)]
    for ids in (*texts, texts[0]):
        ask(engine, ids, 2).wait()
    uses = [one.used for _, one in engine._kept._cache._tree.nodes(*engine._kept._cache._tree.owners())]
    engine.close()
    again = engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    tree = again._kept._cache._tree
    assert sorted(one.used for _, one in tree.nodes(*tree.owners())) == sorted(uses)


def test_an_idle_server_writes_what_it_keeps(checkpoints, load, engine_of, tmp_path: Path, monkeypatch) -> None:
    """So that one that is killed has lost little."""
    model, written = load(checkpoints.get("qwen3_moe"), "50%"), threading.Event()
    monkeypatch.setattr("foreroute.batching.engine._IDLE_S", 0.01)
    own = Beginnings.save

    def noted(self: Beginnings, goes_on) -> None:
        own(self, goes_on)
        if not self.is_unsaved:
            written.set()

    monkeypatch.setattr(Beginnings, "save", noted)
    engine = engine_of(model, max_num_seqs=1, prefix_folder=tmp_path)
    ask(engine, ids_of(model, SYSTEM, 1), 2).wait()
    assert written.wait(60)
    assert stored(tmp_path)
    assert engine._kept.is_unsaved is False
