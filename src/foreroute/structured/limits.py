"""How much a grammar may take, in the process that tries it and in the one that uses it."""

from typing import Any

# Of llguidance's automaton, about 2 kB each: the most of its memory.
_LEXER_STATES = 20_000
_GRAMMAR_SYMBOLS = 200_000


def limits() -> Any:
    """Return llguidance's limits. Its errors do not quote the parser's state, which is text of the user."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_LEXER_STATES, max_grammar_size=_GRAMMAR_SYMBOLS, verbose_errors=False)
