"""What the comparison with other engines says is what was run: options, summaries, and a disk left as it was found."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_runner, peers


def run_of(tpot_s: float, **more: Any) -> dict[str, Any]:
    names = "load_s available_bytes read_bytes_per_token disk_bytes_per_token peak_rss_bytes own_bytes cpu_s_per_token"
    facts = dict.fromkeys([*names.split(), "major_faults_per_token", "ttft_s"], 1.0)
    return {**facts, "engine": "foreroute", "limited": True, "tpot_s": tpot_s, "token_s": [tpot_s], **more}


def test_options_are_read_from_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.foreroute").touch()
    monkeypatch.chdir(tmp_path)
    options = peers.options_of("foreroute:packed=a.foreroute:cache=False:prefetch_width=3:eviction=lru")
    assert options == {
        "packed": str(tmp_path / "a.foreroute"),  # the runner works in another folder
        "cache": False,
        "prefetch_width": 3,
        "eviction": "lru",
    }
    assert peers.options_of("foreroute:packed=q4_0") == {"packed": "q4_0"}
    assert peers.options_of("llama.cpp") == {}


def test_the_read_ahead_is_put_back_even_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    monkeypatch.setattr(peers, "read_ahead_file", lambda path: setting)
    with contextlib.suppress(KeyboardInterrupt), peers.read_ahead(tmp_path, 128):
        assert setting.read_text() == "128"
        raise KeyboardInterrupt
    assert setting.read_text() == "8192\n"
    with peers.read_ahead(tmp_path, None):
        assert setting.read_text() == "8192\n"


def test_a_failed_run_is_a_row_that_says_so() -> None:
    runs = [run_of(0.2, tokens=[1, 2]), {"engine": "foreroute", "limited": True, "error": "exit 1: no room"}]
    row = peers.summarize(runs, [1, 3])
    assert row["runs"] == 1
    assert row["ms_per_token"]["median"] == 200
    assert row["same_tokens"] == 0.5
    assert row["errors"] == ["exit 1: no room"]
    assert "1 runs failed" in peers.table([row])
    assert "no room" in peers.table([peers.summarize(runs[1:], None)])


def test_a_token_of_the_text_follows_the_other_whatever_their_number(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(peers.TEXT.split())}, unk_token="The"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    few, many = peers.tokens_of_text(tmp_path, 7), peers.tokens_of_text(tmp_path, 500)
    assert len(few) == 7
    assert len(many) == 500
    assert many[:7] == few


def test_llama_cpp_gets_the_file_that_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.gguf").write_bytes(b"x")
    (tmp_path / "tokenizer.json").touch()
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(peers, "tokens_of_text", lambda model, count: list(range(count)))
    monkeypatch.setattr(peers, "run_job", lambda job, args: jobs.append(job) or {"tokens": []})
    monkeypatch.setattr(
        "sys.argv", ["peers", str(tmp_path), "--feed", "text", "--prompt-tokens", "2", "--new-tokens", "3"]
    )
    args = peers.parse_args()
    peers.run_engine(f"llama.cpp:gguf={tmp_path / 'b.gguf'}:mmap=False", False, args)
    assert jobs[0]["model"] == str(tmp_path / "b.gguf")
    assert jobs[0]["options"] == {"mmap": False}
    assert (jobs[0]["prompt"], jobs[0]["feed"]) == ([0, 1], [2, 3, 4])
    json.dumps(jobs[0])  # it goes to the runner so
    peer_runner.Job(**jobs[0])


def test_accelerate_keeps_the_first_layers_and_maps_the_others() -> None:
    places = peer_runner.offload_map(num_layers=3, num_resident=1)
    experts = [places[f"model.layers.{layer}.mlp.experts"] for layer in range(3)]
    assert experts == ["cpu", "disk", "disk"]
    assert {place for name, place in places.items() if not name.endswith("experts")} == {"cpu"}
