"""Generate tasks with exactly one right answer, and split them into training and held-out items.

Pure Python, no torch: the evaluation suite imports this module without the training code. Every item is a
prompt and the one answer that counts; the steps that lead to a result are part of the answer, so one wrong token
spoils it.

An item is held out if its key (what is asked, without the wording) hashes into a reserved eighth of all keys. Training
draws only from the other seven eighths, so no held-out item was seen in any wording.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from foreroute.errors import EvaluationError

HELD_OUT_PARTS = 8
# A kind counts as exhausted after this many draws in a row without a new item.
_MOST_FRUITLESS = 20_000
_SHOWN_ENTRIES = 4


@dataclass(frozen=True)
class Item:
    """One question. `answer` is the whole expected completion, with its steps; `key` decides the split."""

    kind: str
    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Kind:
    """A family of questions. `make` draws one item; `multi_step`: the answer writes out dependent steps."""

    name: str
    make: Callable[[random.Random], Item]
    multi_step: bool
    about: str


def is_held_out(kind: str, key: str) -> bool:
    """Whether the item of this kind and key is reserved for evaluation. Stable across machines and Python versions."""
    return zlib.crc32(f"{kind}|{key}".encode()) % HELD_OUT_PARTS == 0


_WORD_LIST = (
    "ant apple arm ball bank bear bell bird boat bone book box bread brush bus cake camp card cat chair clock cloud "
    "coat coin corn cow cup deer desk dish dog door dress drum duck ear egg eye farm fish flag flower foot fork fox "
    "frog game garden gate girl glass goat gold grass hand hat heart hill home horse house ice iron island jar key "
    "king kite knife lake lamp leaf leg letter lion lock map milk moon mouse mouth nail neck nest night nose nut "
    "ocean orange owl paper park pen pig pipe plane plant plate pond pot rain rat ring river road rock roof room "
    "root rope rose salt sand school sea seed sheep ship shoe shop silver sky snow soap sock soup spoon star stone "
    "storm street sugar sun table tail tent tiger tooth town toy train tree truck wall watch water wheel wind "
    "window wolf wood yard "
)
WORDS = tuple(_WORD_LIST.split())
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NAMES = ("Ann", "Ben", "Dan", "Eve", "Jim", "Kim", "Leo", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "nuts", "pens", "shells", "stones")
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def add(rng: random.Random) -> Item:
    """Column addition from the right: `a+b+carry=sum c carry`, one line per digit, then the result."""
    a, b = (_number(rng, rng.randint(2, 5)) for _ in range(2))
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x}+{y}+{carry}={total % 10} c{total // 10}")
        carry = total // 10
    return Item("add", f"{a} + {b}", "\n".join([*lines, f"= {a + b}"]), f"{a}+{b}")


def subtract(rng: random.Random) -> Item:
    """Column subtraction from the right with borrows: `a-b-borrow=digit b borrow`, one line per digit."""
    b, a = sorted(_number(rng, rng.randint(2, 5)) for _ in range(2))
    lines, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        digit = x - y - borrow
        lines.append(f"{x}-{y}-{borrow}={digit % 10} b{int(digit < 0)}")
        borrow = int(digit < 0)
    return Item("subtract", f"{a} - {b}", "\n".join([*lines, f"= {a - b}"]), f"{a}-{b}")


def story(rng: random.Random) -> Item:
    """Word arithmetic: two to four changes of one amount, each written as an equation before the result."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    have = rng.randint(2, 40)
    text, lines, ops = [f"{name} has {have} {thing}."], [], [str(have)]
    for _ in range(rng.randint(2, 4)):
        gains = have < 8 or (have < 80 and rng.random() < 0.5)
        step = rng.randint(2, 19) if gains else rng.randint(2, min(19, have - 1))
        verb = rng.choice(("buys", "finds", "gets") if gains else ("loses", "sells", "eats"))
        text.append(f"{name} {verb} {step}.")
        after = have + step if gains else have - step
        lines.append(f"{have}{'+' if gains else '-'}{step}={after}")
        ops.append(f"{after - have:+d}")
        have = after
    return Item("story", " ".join([*text, "How many now?"]), "\n".join([*lines, f"= {have}"]), "".join(ops))


def sort_numbers(rng: random.Random) -> Item:
    """Sort four to eight different two-digit numbers."""
    numbers = rng.sample(range(10, 100), rng.randint(4, 8))
    text = " ".join(map(str, numbers))
    return Item("sort", f"Sort: {text}", " ".join(map(str, sorted(numbers))), text)


def reverse(rng: random.Random) -> Item:
    """Reverse a list of four to ten words."""
    words = rng.choices(WORDS, k=rng.randint(4, 10))
    return Item("reverse", f"Reverse: {' '.join(words)}", " ".join(reversed(words)), " ".join(words))


def dedupe(rng: random.Random) -> Item:
    """Drop repeated words, keeping the first of each."""
    pool = rng.sample(WORDS, rng.randint(3, 6))
    words = rng.choices(pool, k=rng.randint(5, 12))
    return Item("dedupe", f"Dedupe: {' '.join(words)}", " ".join(dict.fromkeys(words)), " ".join(words))


def count(rng: random.Random) -> Item:
    """Count a letter in a list, writing the running count after every element."""
    target, *others = rng.sample(LETTERS, rng.randint(3, 5))
    letters = [target if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(5, 14))]
    steps, seen = [], 0
    for letter in letters:
        seen += letter == target
        steps.append(f"{letter} {seen}")
    text = " ".join(letters)
    return Item("count", f"Count {target} in: {text}", f"{', '.join(steps)} = {seen}", f"{target} {text}")


def recall(rng: random.Random) -> Item:
    """Look up three values in a table of 8 to 48 keys with three-digit values: the long context."""
    keys = rng.sample(WORDS, rng.randint(8, 48))
    values = {key: _number(rng, 3) for key in keys}
    table = ", ".join(f"{key} {value}" for key, value in values.items())
    asked = rng.sample(keys, 3)
    answer = ", ".join(f"{key} {values[key]}" for key in asked)
    return Item("recall", f"{table}. Give {', '.join(asked)}.", answer, answer)


def brackets(rng: random.Random) -> Item:
    """Close the open brackets, innermost first; the prefix already closes some."""
    text = ""
    stack: list[str] = []
    for _ in range(rng.randint(5, 16)):
        if stack and rng.random() < 0.35:
            text += PAIRS[stack.pop()]
        else:
            stack.append(rng.choice("([{<"))
            text += stack[-1]
    if not stack:
        stack.append("[")
        text += "["
    return Item("brackets", f"Close: {' '.join(text)}", " ".join(PAIRS[one] for one in reversed(stack)), text)


def copy(rng: random.Random) -> Item:
    """Repeat a list of words and numbers."""
    parts = [rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randrange(1000)) for _ in range(rng.randint(5, 16))]
    return Item("copy", f"Copy: {' '.join(parts)}", " ".join(parts), " ".join(parts))


def calendar(rng: random.Random) -> Item:
    """Step two to seven days through a common year, writing every day that passes."""
    weekday, month = rng.randrange(7), rng.randrange(12)
    # Half of the items cross the end of a month; the others only count.
    last = MONTH_DAYS[month]
    day = rng.randint(last - 5, last) if rng.random() < 0.5 else rng.randint(1, last)
    steps = rng.randint(2, 7)
    start, lines = f"{WEEKDAYS[weekday]} {day} {MONTHS[month]}", []
    for n in range(1, steps + 1):
        weekday, day = (weekday + 1) % 7, day + 1
        if day > MONTH_DAYS[month]:
            day, month = 1, (month + 1) % 12
        lines.append(f"{n} {WEEKDAYS[weekday]} {day} {MONTHS[month]}")
    return Item("calendar", f"{start} + {steps} days", "\n".join(lines), f"{start}+{steps}")


def _arithmetic(rng: random.Random) -> tuple[str, list[str]]:
    a, b, c, d = (rng.randint(1, 9) for _ in range(4))
    shape = rng.randrange(4)
    if shape == 0:
        return f"({a} + {b}) * {c}", [f"{a + b} * {c}", str((a + b) * c)]
    if shape == 1:
        return f"{a} + {b} * {c}", [f"{a} + {b * c}", str(a + b * c)]
    if shape == 2:
        return f"({a} + {b}) - ({c} - {d})", [f"{a + b} - {c - d}", str(a + b - (c - d))]
    return f"{a} * {b} + {c} * {d}", [f"{a * b} + {c * d}", str(a * b + c * d)]


def expression(rng: random.Random) -> Item:
    """Evaluate a small Python expression, with the reductions that lead to its value."""
    shape = rng.randrange(6)
    numbers = [rng.randint(0, 9) for _ in range(rng.randint(3, 6))]
    text = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
    at = rng.randrange(3)
    if shape <= 1:
        source, steps = _arithmetic(rng)
    elif shape == 2:
        name = rng.choice(("max", "min", "len"))
        source, steps = (
            f"{name}({numbers})",
            [str({"max": max(numbers), "min": min(numbers), "len": len(numbers)}[name])],
        )
    elif shape == 3:
        source, steps = f"sorted({numbers})[{at}]", [f"{sorted(numbers)}[{at}]", str(sorted(numbers)[at])]
    elif shape == 4:
        source, steps = f"{' '.join(text)!r}.split()[{at}]", [f"{list(text)}[{at}]", repr(text[at])]
    else:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        source, steps = f"{a} > {b} or {numbers[0]} in {numbers[1:]}", []
        steps = [f"{a > b} or {numbers[0] in numbers[1:]}", str(a > b or numbers[0] in numbers[1:])]
    return Item("expression", f">>> {source}", "\n".join(steps), source)


def make_define(glossary: Mapping[str, str]) -> Callable[[random.Random], Item]:
    """Build the `define` task over a glossary (word -> gloss): find the word among four entries, repeat its entry."""
    entries = sorted(glossary.items())

    def define(rng: random.Random) -> Item:
        shown = rng.sample(entries, _SHOWN_ENTRIES)
        word, gloss = rng.choice(shown)
        table = "\n".join(f"{name}: {text}" for name, text in shown)
        return Item("define", f"{table}\nDefine:\n{word}", f"{word}: {gloss}", word)

    return define


MAKERS: tuple[Kind, ...] = (
    Kind("add", add, True, "column addition, carries written out"),
    Kind("subtract", subtract, True, "column subtraction, borrows written out"),
    Kind("story", story, True, "word arithmetic, two to four steps"),
    Kind("sort", sort_numbers, False, "sort 4-8 two-digit numbers"),
    Kind("reverse", reverse, False, "reverse 4-10 words"),
    Kind("dedupe", dedupe, False, "drop repeats, keep the first"),
    Kind("count", count, True, "count a letter, running count written out"),
    Kind("recall", recall, False, "three look-ups among 8-48 key-value pairs"),
    Kind("brackets", brackets, False, "close what is still open"),
    Kind("copy", copy, False, "repeat 5-16 words and numbers"),
    Kind("calendar", calendar, True, "step 2-7 days, every day written out"),
    Kind("expression", expression, True, "a Python expression, reduced to its value"),
)


def kinds(glossary: Mapping[str, str] | None = None) -> dict[str, Kind]:
    """Return all kinds by name; `define` only with a glossary (of the right split) that has enough entries."""
    found = {kind.name: kind for kind in MAKERS}
    if glossary and len(glossary) >= _SHOWN_ENTRIES:
        found["define"] = Kind("define", make_define(glossary), False, "find a word among four entries")
    return found


def draw(kind: Kind, rng: random.Random, held_out: bool) -> Item:
    """Draw an item of `kind` with `rng`, held_out or not. `define` is split by glossary (words), others by key."""
    while True:
        item = kind.make(rng)
        if item.kind == "define" or is_held_out(item.kind, item.key) == held_out:
            return item


def held_out_suite(
    per_kind: int, seed: int = 0, glossary: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> list[Item]:
    """Draw the evaluation items: `per_kind` different held-out items of every kind, the same for the same seed.

    Args:
        glossary: see `kinds`. only: these kinds; all when empty.
    Raises:
        EvaluationError: a kind has fewer different items.
    """
    suite: list[Item] = []
    for name, kind in kinds(glossary).items():
        if only and name not in only:
            continue
        rng = random.Random(f"{seed}/{name}")
        chosen: dict[str, Item] = {}
        fruitless = 0
        while len(chosen) < per_kind:
            item = draw(kind, rng, held_out=True)
            fruitless = fruitless + 1 if item.prompt in chosen else 0
            if fruitless > _MOST_FRUITLESS:
                raise EvaluationError(
                    f"There are no {per_kind} different held-out items of {name}, only some {len(chosen)}. "
                    "Ask for fewer."
                )
            chosen.setdefault(item.prompt, item)
        suite.extend(chosen.values())
    return suite


def is_right(item: Item, completion: str) -> bool:
    """Whether `completion` equals the item's whole answer, steps included; only surrounding white space may differ."""
    return completion.strip() == item.answer.strip()


def accuracy_by_kind(items: Sequence[Item], completions: Sequence[str]) -> dict[str, float]:
    """Share of items with right completions per kind, 0..1."""
    assert len(items) == len(completions)
    right: dict[str, list[bool]] = {}
    for item, completion in zip(items, completions, strict=True):
        right.setdefault(item.kind, []).append(is_right(item, completion))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}
