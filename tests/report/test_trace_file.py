"""What is no whole trace is refused, with the line and what to do; what is one is read as it is."""

import json
from pathlib import Path

import pytest

from foreroute.errors import TraceError
from foreroute.report.chrome import write_chrome
from foreroute.report.timing import recorded_of
from foreroute.report.trace_file import read_recording
from tests.report.traces import end, gone, guess, header, layer, load, routed, stall, step, write


def test_every_event_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.jsonl",
        header(),
        step(0.0, "prefill", positions=7, is_start=True),
        layer(0.0, 0.1, 0, misses=[0, 1, 2]) | {"counts": [[0, 7]]},
        layer(0.1, 0.2, 1, misses=[3]),
        step(1.0),
        guess(1.0, 1, [2, 0]),
        load(0, 3, 1.0, 1.1, "prefetch", asked=0.9),
        stall(1.0, 1.25, 0),
        layer(1.0, 1.3, 0, hits=[1], late_hits=[3], misses=[2], substituted=[0])
        | {"ids": [[1, 3]], "weights": [[0.5, 0.5]]},
        gone("evict", 1.3, 0, 2),
        gone("cancel", 1.3, 1, 2),
        {"event": "governor", "t": 1.3, "share": 0.0, "why": "reads do not pay"},
        {"event": "of a later version", "t": 1.3},
        layer(1.4, 1.5, 1, hits=[0]),
        end() | {"stats": {"evictions": 1}},
    )
    recording = read_recording(path)
    assert recording.header.num_experts == 8
    assert [one.phase for one in recording.steps] == ["prefill", "decode"]
    (decode,) = recording.decode_steps
    assert decode.layers[0].demanded == (1, 3, 2, 0)
    assert decode.stall_s == pytest.approx(0.25)
    assert decode.guesses[0].experts == (2, 0)
    assert decode.end_s == 1.5
    kinds = [type(event).__name__ for event in recording.events]
    assert kinds == ["RecordedStep", "LayerDone", "LayerDone", "RecordedStep", "GuessMade", "LoadDone", "Stall",
                     "LayerDone", "Evicted", "Cancelled", "Governed", "LayerDone"]  # fmt: skip
    asked = next(event for event in recording.events if type(event).__name__ == "LoadDone")
    assert (asked.asked_s, asked.begun_s, asked.end_s, asked.why, asked.nbytes) == (0.9, 1.0, 1.1, "prefetch", 1000)
    assert recording.stats == {"evictions": 1}


WHOLE = (step(0.0), layer(0.0, 0.1, 0, misses=[0, 1]), layer(0.1, 0.2, 1, misses=[0, 1]))


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([step(0.0)], "not a trace: its first line is not a header"),
        ([header(version=3)], "line 1 says version 3; this foreroute reads versions 1 and 2"),
        ([header(top_k=[2])], "line 1 has lists of different lengths"),
        ([header(top_k=[2, 5])], "line 1 describes no model"),
        ([header(num_slots=0)], "line 1 describes no pool"),
        ([header(model=None)], "line 1 lacks 'model'"),
        ([header(num_slots=True)], "line 1 lacks 'num_slots'"),
        ([header(), *WHOLE, end(), *WHOLE], "line 6 comes after the trace's end"),
        ([header(), header()], "line 2 is a second header"),
        ([header(), *WHOLE], "was cut off: there is no end after line 4.*--partial to use its 1 whole steps"),
        ([header(), layer(0, 1, 0)], "line 2 comes before the first step"),
        ([header(), step(0.0), layer(0, 1, 1)], "line 3 is of layer 1 where layer 0 was due"),
        ([header(), step(0.0), layer(0, 1, 2)], "line 3 names layer 2; there are 2"),
        ([header(), step(0.0), layer(0, 1, 0, hits=[4])], "line 3 names expert 4 of layer 0, which has 4"),
        ([header(), step(0.0), layer(0, 1, 0, hits=[1], late_hits=[1])], "line 3 demands an expert twice"),
        ([header(), step(0.0), layer("soon", 1, 0)], "line 3 lacks the time 't'"),
        ([header(), step(0.0, "training")], "line 2 is a step of phase 'training'"),
        ([header(), load(0, 0, 0, 1, bytes=1.5)], "line 2 lacks 'bytes'"),
        ([header(), step(0.0), guess(0, 0, ["a"])], "line 3 has something else than whole numbers in 'experts'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, events, complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        read_recording(write(tmp_path / "run.jsonl", *events))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_recording(path)
    path.write_text("")
    with pytest.raises(TraceError, match="is empty"):
        read_recording(path)
    path.write_text('[{"name":"foreroute"},\n{"name":"x"}]')
    with pytest.raises(TraceError, match="looks like a Chrome trace"):
        read_recording(path)
    path.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(TraceError, match="not a trace"):
        read_recording(path)


def test_a_half_last_line_is_cut_off_and_a_half_line_within_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(), *WHOLE, step(0.3), layer(0.3, 0.4, 0, misses=[0]))
    whole = path.read_text()
    path.write_text(whole + '{"event":"layer","t":0.')
    with pytest.raises(TraceError, match=r"was cut off: line 7 is half\..*its 1 whole steps"):
        read_recording(path)
    recording = read_recording(path, is_partial=True)
    assert (len(recording.steps), recording.num_broken, recording.is_whole) == (1, 1, False)
    path.write_text(whole + '{"event":"layer","t":0.\n' + json.dumps(end()) + "\n")
    with pytest.raises(TraceError, match="line 7 is damaged"):
        read_recording(path, is_partial=True)


def test_a_last_line_without_its_newline_is_half_even_if_it_is_json(tmp_path: Path) -> None:
    """It may have been cut inside a number."""
    path = write(tmp_path / "run.jsonl", header(), *WHOLE, end())
    path.write_text(path.read_text()[:-1])
    with pytest.raises(TraceError, match="line 5 is half"):
        read_recording(path)


def test_steps_that_broke_off_are_counted_and_left_out(tmp_path: Path) -> None:
    broken = (step(0.5), layer(0.5, 0.6, 0, misses=[2]))
    recording = read_recording(write(tmp_path / "run.jsonl", header(), *WHOLE, *broken, *WHOLE, end()))
    assert (len(recording.decode_steps), recording.num_broken) == (2, 1)


def test_progress_ends_where_the_file_ends(tmp_path: Path) -> None:
    path = routed(tmp_path / "run.jsonl", [[[0, 1], [0, 1]]] * 400)
    seen: list[tuple[int, int]] = []
    read_recording(path, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_a_trace_of_version_1_is_read_under_the_names_of_today(tmp_path: Path) -> None:
    layers = [
        {"event": "layer", "t": 0.0, "end": 0.1, "layer": 0, "hits": [1], "late": [3], "misses": [2], "stood_in": []},
        {"event": "layer", "t": 0.1, "end": 0.2, "layer": 1, "hits": [], "late": [], "misses": [], "stood_in": [0, 2]},
    ]
    counts = {"late": 1, "stood_in": 2, "fill_loads": 1, "fill_bytes": 1000, "unguessed_steps": 0, "hits": 1}
    stats = {"prefill": {}, "decode": counts, "evictions": 3}
    path = write(
        tmp_path / "old.jsonl", header(version=1), step(0.0), load(1, 0, 0.1, 0.2, "fill"), *layers,
        end() | {"stats": stats},
    )  # fmt: skip
    recording = read_recording(path)
    first, second = recording.decode_steps[0].layers
    assert (first.hits, first.late_hits, first.misses) == ((1,), (3,), (2,))
    assert second.substituted == (0, 2)
    assert recording.stats["decode"] == {
        "late_hits": 1, "substituted": 2, "deferred_loads": 1, "deferred_bytes": 1000, "steps_without_prefetch": 0,
        "hits": 1,
    }  # fmt: skip
    assert recorded_of(recording, 0).deferred_bytes == 1000
    write_chrome(path, tmp_path / "old.json")
    converted = json.loads((tmp_path / "old.json").read_text())
    assert converted[0]["args"]["version"] == 2
    assert any(event["name"].startswith("deferred: ") for event in converted)
    assert "stood_in" not in (tmp_path / "old.json").read_text()
