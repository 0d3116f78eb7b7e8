"""Compile grammars for one model: tried in another process first, and kept for the next request that asks the same."""

import json
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foreroute.errors import GrammarError
from foreroute.model.generation_settings import end_tokens
from foreroute.structured.grammar import Grammar
from foreroute.structured.limits import limits
from foreroute.structured.mask import GrammarMask, GrammarProcessor
from foreroute.structured.vocabulary import vocabulary_of

# Seconds of the processor; of the clock, on a machine that is busy, many more.
_TRIAL_BYTES, _TRIAL_S, _TRIAL_WAIT_S = 160 * 2**20, 5, 60
# This package, and not the working folder, which may be a model's: see server/dialogue/templates.py.
_START_TRIAL = (
    f"import sys; sys.path[:] = [{str(Path(__file__).parents[2])!r}, *(folder for folder in sys.path if folder)]; "
    "from foreroute.structured.trial import main; main()"
)
_MOST_KEPT = 32
_UNKNOWN = re.compile(r"Unimplemented keys: \[(.*)\]")
_ADVICE = "Leave it out, and check the answer yourself."


class CompiledGrammar:
    """A grammar that is ready to be used, any number of times.

    Args:
        matcher: llguidance's LLMatcher at its start. vocab_size, ends: see `GrammarCompiler`.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Collection[int]) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, frozenset(ends)

    def start(self) -> GrammarMask:
        """Return the mask of one answer's first token."""
        return GrammarMask(self._matcher.deep_copy(), self._vocab_size, self._ends)

    def processor(self) -> GrammarProcessor:
        """Return it as a logits processor, for `foreroute.generation.generate` and transformers' generate()."""
        return GrammarProcessor(self.start)


class GrammarCompiler:
    """Compiles grammars for one model. Its methods may be called from any thread.

    Args:
        tokenizer: of transformers. vocab_size: of the model's logits.
        ends: tokens that end an answer; they are allowed where the grammar is complete, and nowhere else.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, frozenset(ends)
        self._vocabulary: Any = None
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> "GrammarCompiler":
        """Return the compiler for `model` (of `foreroute.load`, or any causal one of transformers)."""
        return cls(tokenizer, model.config.get_text_config().vocab_size, end_tokens(model.generation_config))

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar. Blocks: some 0.1 s for a new one, and up to seconds for a very large one.

        Raises:
            GrammarError: it cannot be enforced, or takes too much; the keyword or the place is named.
        """
        text = grammar.text
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(self._tokenizer, self._vocab_size, self._ends)
        _try(text)
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=limits())
        if matcher.is_error():
            raise GrammarError(_in_words(matcher.get_error()))
        compiled = CompiledGrammar(matcher, self._vocab_size, self._ends)
        with self._lock:
            self._kept[text] = compiled
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return compiled


def _try(text: str) -> None:
    """Try the grammar in another process.

    Raises:
        GrammarError: it is refused there, or takes too much.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _START_TRIAL, str(_TRIAL_BYTES), str(_TRIAL_S)],
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TRIAL_WAIT_S,
            env={name: value for name, value in os.environ.items() if "KEY" not in name and "TOKEN" not in name},
            start_new_session=True,
            check=False,
        )
        said = json.loads(ended.stdout) if ended.returncode == 0 else None
    except subprocess.TimeoutExpired:
        said = None
    if said is None:
        raise GrammarError("It takes too much time or memory to be compiled. Make it smaller.")
    if "error" in said:
        raise GrammarError(_in_words(said["error"]))


def _in_words(error: str) -> str:
    """What llguidance says, in a line that tells what to do."""
    error = error.replace("<non-verbose/>", "").strip()
    unknown = _UNKNOWN.search(error)
    if unknown is not None:
        return f"The schema has {unknown[1]}, which cannot be enforced. {_ADVICE}"
    if "oneOf" in error:
        return (
            'The schema has "oneOf" with parts that one answer can fit at once, which cannot be enforced. Use "anyOf".'
        )
    if "NoExtension" in error or "Unsatisfiable" in error:
        return f"No answer is valid: {' '.join(error.split())[:300].rstrip('.')}."
    if "regex parse error" in error:
        return f"Its regex is not accepted: {error.rpartition('error: ')[2].splitlines()[0].rstrip('.')}."
    if "too big" in error or "too large" in error or "max is" in error or "limit" in error:
        return f"It is too large: {' '.join(error.split())[:200]}."
    return f"It cannot be enforced: {' '.join(error.split())[:300].rstrip('.')}."
