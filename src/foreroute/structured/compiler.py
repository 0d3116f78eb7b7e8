"""Compile grammars for one model: tried in another process first, and kept for the next request that asks the same."""

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel

from foreroute.errors import GrammarError, QueueFullError
from foreroute.model.generation_settings import end_tokens
from foreroute.structured.grammar import Grammar
from foreroute.structured.limits import limits
from foreroute.structured.mask import GrammarMask, GrammarProcessor
from foreroute.structured.trials import Trials
from foreroute.structured.vocabulary import vocabulary_of

# Trials at once: each takes a processor, and more memory than an answer. Further ones wait, and no more than some.
_WORKERS, _MOST_WAITING = 2, 16
_MOST_REFUSED = 256
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
        # By what the grammar says: compiled ones, what is wrong with refused ones, and those that are worked on.
        self._kept: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._jobs: dict[bytes, Future[CompiledGrammar]] = {}
        self._lock, self._vocabulary_lock = threading.Lock(), threading.Lock()
        self._trials = Trials()
        self._workers = ThreadPoolExecutor(_WORKERS, "foreroute-grammar")

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> "GrammarCompiler":
        """Return the compiler for `model` (of `foreroute.load`, or any causal one of transformers)."""
        return cls(tokenizer, model.config.get_text_config().vocab_size, end_tokens(model.generation_config))

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar. Blocks: some 0.1 s for a new one, and up to seconds for a very large one.

        Raises:
            GrammarError: it cannot be enforced, or takes too much; the keyword or the place is named.
            QueueFullError, ForerouteError: see `submit`.
        """
        return self.submit(grammar).result()

    def submit(self, grammar: Grammar) -> "Future[CompiledGrammar]":
        """Return what will be the compiled grammar, or its error as `compile` raises it; the work is done elsewhere.

        A grammar that is kept, was refused, or is being compiled for another request is not tried again.

        Raises:
            QueueFullError: too many others are compiled or wait for that, or the compiler is closed.
        """
        text = grammar.text
        key = hashlib.sha256(text.encode()).digest()
        with self._lock:
            done: Future[CompiledGrammar] = Future()
            if key in self._kept:
                self._kept.move_to_end(key)
                done.set_result(self._kept[key])
                return done
            if key in self._refused:
                self._refused.move_to_end(key)
                done.set_exception(GrammarError(self._refused[key]))
                return done
            if key in self._jobs:
                return self._jobs[key]
            if len(self._jobs) >= _WORKERS + _MOST_WAITING:
                raise QueueFullError(f"{len(self._jobs)} grammars are compiled or wait already. Try again later.")
            try:
                job = self._jobs[key] = self._workers.submit(self._compile, text, key)
            except RuntimeError:
                raise QueueFullError("The server is shutting down.") from None
            return job

    def close(self) -> None:
        """End trials in progress, and take no more."""
        # Those that wait find the trials closed, and tell whoever waits for them.
        self._trials.close()
        self._workers.shutdown(wait=False)

    def _compile(self, text: str, key: bytes) -> CompiledGrammar:
        """Try and compile a grammar, and keep it; or what is wrong with it. Runs in a thread of the workers."""
        compiled, refused = None, ""
        try:
            compiled = self._tried(text)
        except GrammarError as error:
            refused = str(error)
            raise
        finally:
            with self._lock:
                del self._jobs[key]
                if compiled is not None:
                    self._kept[key] = compiled
                if refused:
                    self._refused[key] = refused
                while len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
                while len(self._refused) > _MOST_REFUSED:
                    self._refused.popitem(last=False)
        return compiled

    def _tried(self, text: str) -> CompiledGrammar:
        from llguidance import LLMatcher

        wrong = self._trials.attempt(text)
        if not wrong:
            with self._vocabulary_lock:
                if self._vocabulary is None:
                    self._vocabulary = vocabulary_of(self._tokenizer, self._vocab_size, self._ends)
            matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=limits())
            if not matcher.is_error():
                return CompiledGrammar(matcher, self._vocab_size, self._ends)
            wrong = matcher.get_error()
        raise GrammarError(_in_words(wrong))


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
