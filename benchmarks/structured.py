"""Structured output: whether all that is drawn within a schema is valid by it, and what the masks cost.

    python -m benchmarks.structured [models/foreroute-tiny] [--samples 20] [--schemas N]

A model of random weights, with the tokenizer and the shape of the given one, answers under each of the schemas of
tests/support/schemas.py at temperature 1, eight at a time beside free rows; every answer that ends is parsed, and
validated by jsonschema-rs. Free rows must draw what they draw alone. Then the given model answers with and without a
grammar, and the time of masks is set beside the time of a token. The last line is JSON.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import jsonschema_rs
import torch
from transformers import AutoConfig

from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.model.text import load_tokenizer
from foreroute.structured.compiler import CompiledGrammar, GrammarCompiler
from foreroute.structured.grammar import Grammar
from foreroute.structured.mask import GrammarMask
from tests.support.checkpoints import random_model, save_checkpoint
from tests.support.schemas import SCHEMAS

_MOST_NEW, _FREE_NEW, _AT_ONCE = 256, 24, 8
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Caller:
    """One request: its text, its tokens and when they came."""

    def __init__(
        self, engine: BatchEngine, ids: list[int], seed: int, new: int, grammar: CompiledGrammar | None
    ) -> None:
        self.text, self.tokens, self.times_s = "", list[int](), list[float]()
        self.end: Finished | None = None
        self._is_over = threading.Event()
        engine.submit(Request(ids, new, Sampling(temperature=1.0, top_k=0, seed=seed), grammar=grammar), self._take)

    def _take(self, event: Any) -> None:
        if isinstance(event, NewToken):
            self.text += event.text
            self.tokens.append(event.token_id)
            self.times_s.append(time.perf_counter())
        elif isinstance(event, Finished):
            self.text += event.text
            self.end = event
            self._is_over.set()

    def wait(self) -> "Caller":
        """Wait for its end."""
        assert self._is_over.wait(600), "a request does not end"
        assert self.end is not None
        assert self.end.reason in ("stop", "length"), self.end
        return self


@contextmanager
def opened(folder: Path) -> Iterator[tuple[BatchEngine, GrammarCompiler, Any]]:
    """While inside: an engine of eight rows over the model in `folder`, the compiler of its grammars, its tokenizer."""
    tokenizer = load_tokenizer(folder)
    model = foreroute.load(folder, "100%", dtype="float32", config=EngineConfig(packed="no"))
    engine = BatchEngine(model, tokenizer, 512, _AT_ONCE, 64)
    try:
        yield engine, GrammarCompiler.of(model, tokenizer), tokenizer
    finally:
        engine.close()
        model.foreroute.close()


def validate(folder: Path, samples: int, names: list[str]) -> dict[str, Any]:
    """Draw `samples` answers under each of the schemas `names`, and validate them."""
    with opened(folder) as (engine, compiler, tokenizer):
        ids = tokenizer("An answer as JSON: ")["input_ids"]
        free_alone = Caller(engine, ids, 1, _FREE_NEW, None).wait().tokens
        counts: Counter[str] = Counter()
        wrong: list[str] = []
        for name in names:
            schema = SCHEMAS[name]
            grammar = compiler.compile(Grammar.json_schema(schema))
            validator = jsonschema_rs.validator_for(schema, validate_formats=True)
            callers = [Caller(engine, ids, seed, _MOST_NEW, grammar) for seed in range(samples)]
            free = Caller(engine, ids, 1, _FREE_NEW, None)
            for caller in callers:
                counts[caller.wait().end.reason] += 1  # type: ignore[union-attr]
                if (
                    caller.end is not None
                    and caller.end.reason == "stop"
                    and not _is_valid(validator, schema, caller.text)
                ):
                    wrong.append(f"{name}: {caller.text[:200]}")
            counts["free rows"] += 1
            counts["free rows with other tokens"] += free.wait().tokens != free_alone
        return {**counts, "schemas": len(names), "invalid": len(wrong), "wrong": wrong[:10]}


def _is_valid(validator: Any, schema: dict[str, Any], text: str) -> bool:
    # A leap second: allowed at any minute by the format's grammar, and by no validator.
    told = text.replace(":60", ":59") if schema.get("format") in ("time", "date-time") else text
    try:
        # A number may have any exponent, which a double does not hold: JSON sets no bound to it.
        return bool(validator.is_valid(json.loads(told, parse_float=_finite)))
    except ValueError:
        return False


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


def price(folder: Path, answers: int) -> dict[str, Any]:
    """Time per token of `folder`'s model within a grammar, and what of it goes to masks."""
    spent: list[float] = []
    allowed, accept = GrammarMask.apply, GrammarMask.accept

    def timed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            found = function(*args)
            spent.append(time.perf_counter() - began)
            return found

        return run

    schema = {"type": "array", "items": SCHEMAS["of_programs-8"], "minItems": 20}
    with opened(folder) as (engine, compiler, tokenizer):
        ids = tokenizer("An answer as JSON: ")["input_ids"]
        grammar = compiler.compile(Grammar.json_schema(schema))
        tpot: dict[str, list[float]] = {"free": [], "masked": []}
        shares = []
        for at in range(answers):
            for kind in ("free", "masked") if at % 2 == 0 else ("masked", "free"):
                GrammarMask.apply, GrammarMask.accept = timed(allowed), timed(accept)  # type: ignore[method-assign]
                spent.clear()
                one = Caller(engine, ids, at, 128, grammar if kind == "masked" else None).wait()
                GrammarMask.apply, GrammarMask.accept = allowed, accept  # type: ignore[method-assign]
                if len(one.times_s) < 16:
                    continue
                tpot[kind].append((one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1))
                if kind == "masked":
                    shares.append(sum(spent) / len(one.times_s) / tpot[kind][-1])
        return {
            "tpot_ms": {kind: 1e3 * statistics.median(times) for kind, times in tpot.items()},
            "mask_share": statistics.median(shares),
            "mask_us": 1e6 * statistics.median(shares) * statistics.median(tpot["masked"]),
        }


def main() -> None:
    """Run both, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/foreroute-tiny"))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS), help="of the schemas, this many, evenly chosen")
    parser.add_argument("--answers", type=int, default=10, help="answers of each kind that are timed")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    names = [
        name
        for at, name in enumerate(SCHEMAS)
        if at * args.schemas // len(SCHEMAS) != (at - 1) * args.schemas // len(SCHEMAS)
    ]
    with tempfile.TemporaryDirectory() as made:
        folder = save_checkpoint(random_model(AutoConfig.from_pretrained(args.model), 0), Path(made) / "random")
        for name in _TOKENIZER:
            shutil.copy(args.model / name, folder / name)
        torch.set_num_threads(1)
        found = validate(folder, args.samples, names)
    found["cost"] = price(args.model, args.answers)
    assert not found["invalid"], found["wrong"]
    assert not found["free rows with other tokens"]
    _harness.record("structured", found, keep=not args.no_record)


if __name__ == "__main__":
    main()
