"""Turns, medians, and the memory of one model among several."""

import mmap

from benchmarks._harness import interleave
from foreroute.bench.process import PeakRss, rss_bytes
from foreroute.bench.repeats import summary, turns


def test_turns_go_forwards_and_backwards():
    assert list(turns("AB", 3)) == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B")]


def test_the_first_figure_warms_up():
    seen = []
    figures = interleave({name: lambda name=name: (seen.append(name), len(seen))[1] for name in "ab"}, 2)
    assert seen == list("ababba")
    assert figures == {"a": [3, 6], "b": [4, 5]}


def test_summary_of_one_and_of_many():
    assert summary([3.0]) == {"median": 3.0, "p25": 3.0, "p75": 3.0, "min": 3.0, "max": 3.0, "repeats": 1}
    assert summary([1.0, 2.0, 3.0, 4.0, 10.0])["p75"] == 4.0


def test_memory_that_others_take_is_not_this_ones():
    def touched(nbytes: int) -> mmap.mmap:
        block = mmap.mmap(-1, nbytes)
        for at in range(0, nbytes, 4096):
            block[at] = 1
        return block

    base, mb = rss_bytes(), 2**20
    one, other = PeakRss(base), PeakRss(base)
    with one:
        kept = touched(40 * mb)
    with other:
        touched(64 * mb).close()  # a peak that does not stay
    with one:
        touched(16 * mb).close()
    assert base is not None
    assert 54 * mb <= one.peak_bytes - base < 62 * mb
    assert 62 * mb <= other.peak_bytes - base < 70 * mb
    kept.close()
