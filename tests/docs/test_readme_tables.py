"""README's tables are those of the results that are kept, and the command that writes them changes nothing else."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme_tables
from benchmarks.readme_tables import OSS_120B, QWEN3, README, expected, fits, newest, speeds, written

TEXT = README.read_text(encoding="utf-8")


def test_readmes_tables_are_those_of_the_results() -> None:
    assert written(TEXT, newest()) == TEXT, "python -m benchmarks.readme_tables"
    command = [sys.executable, "-m", "benchmarks.readme_tables", "--check"]
    assert subprocess.run(command, cwd=README.parent, check=False).returncode == 0


def test_a_table_that_differs_is_seen_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = tmp_path / "README.md"
    spoilt.write_text(TEXT.replace("| measured |", "| hoped |", 1), encoding="utf-8")
    monkeypatch.setattr(readme_tables, "README", spoilt)
    monkeypatch.setattr("sys.argv", ["readme_tables", "--check"])
    assert readme_tables.main() == 1
    assert "python -m benchmarks.readme_tables" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["readme_tables"])
    assert readme_tables.main() == 0
    assert spoilt.read_text(encoding="utf-8") == TEXT


def test_a_readme_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table: fits"):
        written(TEXT.replace("<!-- table: fits -->", ""), newest())


def test_figures_come_from_the_results() -> None:
    results = copy.deepcopy(newest())
    (packed,) = (row for row in results["qwen3-50-32"]["rows"] if row["engine"].startswith("foreroute:packed"))
    packed["ms_per_token"]["median"] = 40.0
    assert "| **40** |" in speeds(results).splitlines()[3]
    assert "| Qwen3-30B-A3B, Q4_K_M, 18.6 GB | 25.0 | measured |" in fits(results).splitlines()[3]
    (resident,) = (row for row in results["qwen3-resident-32"]["rows"] if row["engine"].startswith("foreroute:packed"))
    before = expected(QWEN3, 8, 5.0, results)
    resident["ms_per_token"]["median"] *= 2
    assert expected(QWEN3, 8, 5.0, results)[0] < before[0]
    assert "no room" in speeds(results)


def test_the_newest_result_of_each_benchmark_counts(tmp_path: Path) -> None:
    for date, median in (("2026-11-30T23", 2), ("2026-12-01T01", 3), ("2026-11-29T01", 1)):
        (tmp_path / f"{date[:10]}-published-one-{median}.json").write_text(
            f'{{"benchmark": "published-one", "date": "{date}", "median": {median}}}'
        )
    assert newest(tmp_path)["one"]["median"] == 3


def test_sizes_of_forecasts_are_those_of_the_published_files() -> None:
    from benchmarks.published_files import SHAPES, tensors

    for sizes in (QWEN3, OSS_120B):
        shape = SHAPES[sizes.like]
        assert sizes.like_layers == shape.layers
        assert sizes.top_k == shape.top_k
        experts = sum(tensor.nbytes for tensor in tensors(shape) if "_exps." in tensor.name)
        assert sizes.expert_bytes == pytest.approx(experts / (shape.layers * shape.experts), rel=1e-3)


def test_more_memory_and_a_quicker_disk_are_quicker() -> None:
    results = newest()
    slow, more, quick = (expected(OSS_120B, gib, disk, results) for gib, disk in ((16, 2.4), (32, 2.4), (32, 5.0)))
    assert slow[0] < more[0] < quick[0]
    assert slow[0] < slow[1]
    whole = expected(QWEN3, 32, 2.4, results)
    assert whole[0] == whole[1], "everything fits: nothing is read"
