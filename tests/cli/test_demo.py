"""`foreroute demo`: a real comparison that can say no, and that refuses to prove nothing."""

from pathlib import Path

import pytest

from foreroute import shipped
from foreroute.cli.commands import demo

FAST = ("--threads", "1", "--max-new-tokens", "24")


def test_the_tokens_are_compared_with_the_resident_model(run, tiny: Path) -> None:
    ran = run("demo", "hello", "--model", tiny, *FAST)
    assert ran.code == 0, ran.out + ran.err
    assert "same tokens as the resident model: yes (24 of 24)" in ran.out
    assert "hello" in ran.out
    assert "64 experts in 4 layers" in ran.out
    answer = run("demo", "hello", "--model", tiny, "--json", *FAST).json
    assert answer["same_tokens"]
    assert answer["inert"] == []
    assert answer["token_ids"] == answer["resident_token_ids"]
    assert answer["figures"]["evictions"] > 0
    assert answer["figures"]["prefetch_used"] > 0


def test_other_tokens_are_a_no_that_names_the_first(run, tiny: Path, monkeypatch) -> None:
    resident = demo.resident_tokens

    def other(*args) -> tuple[int, ...]:
        ids = resident(*args)
        return (*ids[:7], ids[7] ^ 1, *ids[8:])

    monkeypatch.setattr(demo, "resident_tokens", other)
    ran = run("demo", "hello", "--model", tiny, *FAST)
    assert ran.code == 1
    assert "same tokens as the resident model: no: token 8 of 24 is " in ran.out


@pytest.mark.parametrize(
    ("ours", "expected", "verdict"),
    [([1, 2], [1, 2], "yes (2 of 2)"), ([1, 2], [1, 2, 3], "no: 2 tokens in place of 3")],
)
def test_verdicts(tokenizer, ours: list[int], expected: list[int], verdict: str) -> None:
    assert demo.compare(ours, expected, tokenizer) == verdict


def test_a_run_in_which_nothing_happened_proves_nothing(run, tiny: Path) -> None:
    # One new token: no decode step, so no prefetch can be used.
    ran = run("demo", "hello", "--model", tiny, "--threads", "1", "--max-new-tokens", "1")
    assert ran.code == 1
    assert "yes (1 of 1)" in ran.out
    assert "no prefetch was used" in ran.out


def test_everything_in_memory_has_nothing_to_evict(run, tiny: Path) -> None:
    ran = run("demo", "hello", "--model", tiny, "--memory", "100%", *FAST)
    assert ran.code == 0, ran.out


def test_without_the_model_the_error_says_where_it_was_looked_for(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "src" / "foreroute")
    ran = run("demo")
    assert ran.code == 2
    assert str(tmp_path / "models" / "foreroute-tiny") in ran.err
    assert "--model" in ran.err


def test_the_model_is_found_in_the_package_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "src" / "foreroute")
    in_repository = tmp_path / "models" / demo.MODEL_NAME
    in_package = tmp_path / "src" / "foreroute" / "models" / demo.MODEL_NAME
    for folder in (in_repository, in_package):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        assert demo.find_model() == folder
