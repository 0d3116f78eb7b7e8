"""Tasks: one right answer, told apart from training, the same on every machine."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.errors import EvaluationError
from foreroute.evals import tasks

GLOSSARY = {"ant": "a small insect", "bay": "a part of the sea", "cup": "a small open vessel", "den": "a wild home"}
KINDS = tasks.kinds(GLOSSARY)
seeds = st.integers(0, 10**6)


def make(kind: str, seed: int) -> tasks.Item:
    return KINDS[kind].make(random.Random(seed))


def test_enough_kinds_and_enough_of_them_need_several_steps() -> None:
    assert len(KINDS) >= 8
    assert sum(kind.multi_step for kind in KINDS.values()) >= 2


@given(seeds)
def test_written_out_arithmetic_is_right(seed: int) -> None:
    for kind, sign in (("add", 1), ("subtract", -1)):
        item = make(kind, seed)
        a, b = map(int, re.split(r" [+-] ", item.prompt))
        *columns, result = item.answer.splitlines()
        assert result == f"= {a + sign * b}"
        digits = [re.search(r"=(\d)", column) for column in columns]
        assert int("".join(found[1] for found in reversed(digits) if found)) % 10 ** len(columns) == (
            a + sign * b
        ) % 10 ** len(columns)


@given(seeds)
def test_a_story_ends_with_what_its_equations_say(seed: int) -> None:
    item = make("story", seed)
    *steps, result = item.answer.splitlines()
    have = int(re.findall(r"\d+", item.prompt)[0])
    for step in steps:
        left, value = step.split("=")
        assert left.startswith(str(have))
        assert eval(left) == int(value) > 0
        have = int(value)
    assert result == f"= {have}"


@given(seeds)
def test_list_tasks_are_what_python_says(seed: int) -> None:
    def after(item: tasks.Item) -> list[str]:
        return item.prompt.split(": ")[1].split()

    item = make("sort", seed)
    assert item.answer.split() == sorted(after(item), key=int)
    item = make("reverse", seed)
    assert item.answer.split() == after(item)[::-1]
    item = make("dedupe", seed)
    assert item.answer.split() == list(dict.fromkeys(after(item)))
    item = make("copy", seed)
    assert item.answer.split() == after(item)
    item = make("count", seed)
    assert item.answer.endswith(f"= {after(item).count(item.prompt.split()[1])}")
    item = make("brackets", seed)
    whole = "".join(after(item)) + item.answer.replace(" ", "")
    for _ in whole:
        whole = re.sub(r"\(\)|\[\]|\{\}|<>", "", whole)
    assert whole == ""


@given(seeds)
def test_expressions_have_the_value_that_python_gives(seed: int) -> None:
    item = make("expression", seed)
    assert item.answer.splitlines()[-1] == repr(eval(item.prompt.removeprefix(">>> ")))


@given(seeds)
def test_recall_and_define_repeat_what_the_prompt_holds(seed: int) -> None:
    item = make("recall", seed)
    table = item.prompt.split(". Give ")[0].split(", ")
    assert set(item.answer.split(", ")) <= set(table)
    assert len(item.answer.split(", ")) == 3
    item = make("define", seed)
    assert item.answer in item.prompt.splitlines()
    assert item.answer.startswith(item.prompt.splitlines()[-1] + ": ")


@given(seeds)
def test_a_calendar_step_is_one_day(seed: int) -> None:
    import datetime

    item = make("calendar", seed)
    start, days = item.prompt.removesuffix(" days").split(" + ")
    lines = [start, *(line.split(" ", 1)[1] for line in item.answer.splitlines())]
    assert len(lines) == int(days) + 1
    # 2023 is a common year; the weekday of the item's own year does not matter, only that it advances by one.
    dates = [datetime.datetime.strptime(f"2023 {line[4:]}", "%Y %d %b") for line in lines]
    for (line, date), (next_line, next_date) in zip(
        zip(lines, dates, strict=True), zip(lines[1:], dates[1:], strict=True), strict=False
    ):
        assert (next_date - date).days % 365 == 1
        assert tasks.WEEKDAYS.index(next_line[:3]) == (tasks.WEEKDAYS.index(line[:3]) + 1) % 7


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "define"])
def test_training_and_held_out_items_share_nothing(kind: str) -> None:
    rng = random.Random(1)
    train = {tasks.draw(KINDS[kind], rng, held_out=False).key for _ in range(400)}
    held_out = {item.key for item in tasks.held_out_suite(20) if item.kind == kind}
    assert held_out
    assert not train & held_out
    assert all(tasks.is_held_out(kind, key) for key in held_out)


def test_the_suite_is_the_same_every_time_and_differs_by_seed() -> None:
    assert tasks.held_out_suite(5) == tasks.held_out_suite(5)
    assert tasks.held_out_suite(5) != tasks.held_out_suite(5, seed=1)


def test_asked_kinds_alone_are_drawn_and_more_than_there_are_is_refused() -> None:
    whole = tasks.held_out_suite(5, glossary=GLOSSARY)
    assert tasks.held_out_suite(5, glossary=GLOSSARY, only=("sort", "define")) == [
        item for item in whole if item.kind in ("sort", "define")
    ]
    with pytest.raises(EvaluationError, match="no 3000 different held-out items of calendar"):
        tasks.held_out_suite(3000, only=("calendar",))
    assert "define" not in tasks.kinds({"ant": "a small insect"})


def test_one_wrong_token_spoils_the_answer() -> None:
    item = tasks.Item("add", "1 + 1", "1+1+0=2 c0\n= 2", "1+1")
    assert tasks.is_right(item, " 1+1+0=2 c0\n= 2\n")
    assert not tasks.is_right(item, "1+1+0=2 c1\n= 2")
    assert tasks.accuracy_by_kind([item, item], ["1+1+0=2 c0\n= 2", "2"]) == {"add": 0.5}
