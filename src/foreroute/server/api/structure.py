"""Structured output: the fields that ask for it, of OpenAI and of other servers, as one grammar."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foreroute.errors import ForerouteError, GrammarError, QueueFullError
from foreroute.server.api.problems import RETRY_SOON, ApiError, not_possible, not_supported

if TYPE_CHECKING:
    from foreroute.server.api.schema import ChatRequest, CompletionRequest
    from foreroute.server.backend import Serving
    from foreroute.structured.compiler import CompiledGrammar
    from foreroute.structured.grammar import Grammar

# vLLM's names (guided_*), SGLang's (json_schema, regex, ebnf) and llama.cpp's (json_schema, grammar), by meaning.
_MEANING = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "json_schema": "json", "regex": "regex", "ebnf": "grammar", "grammar": "grammar",
}  # fmt: skip
FIELDS = frozenset({"response_format", "structured_outputs", *_MEANING})
# Of vLLM's structured_outputs: switches of its backends, which change no valid answer.
_HINTS = frozenset({
    "disable_any_whitespace", "disable_fallback", "disable_additional_properties", "whitespace_pattern", "backend",
})  # fmt: skip


async def grammar_asked(asked: "ChatRequest | CompletionRequest") -> "tuple[str, Grammar] | None":
    """Return the field that asks for structure, and its grammar; None where answers are free text.

    Raises:
        ApiError: 400: it is none, or there are two.
    """
    found = await asyncio.to_thread(_found, asked)
    if found is not None and asked.ignore_eos:
        raise not_possible("ignore_eos", f"{found[0]} says where an answer ends: leave ignore_eos out.")
    return found


async def grammar_for(asked: "ChatRequest | CompletionRequest", serving: "Serving") -> "CompiledGrammar | None":
    """Return the compiled grammar that was `asked` for; None where answers are free text.

    Raises:
        ApiError: 400, where it cannot be enforced: the field, and the keyword or the place in it, are named.
    """
    found = await grammar_asked(asked)
    return None if found is None else await compiled(*found, serving)


async def schema_grammar(name: str, schema: Any) -> "tuple[str, Grammar]":
    """Return the field `name`, which has a JSON schema, and its grammar.

    Raises:
        ApiError: 400: it is no schema, or is nested too deep.
    """
    try:
        return name, await asyncio.to_thread(_of, "json", schema, name)
    except GrammarError as error:
        raise refused(name, error) from error


async def compiled(name: str, grammar: "Grammar", serving: "Serving") -> "CompiledGrammar":
    """Return the `grammar` of the field `name`, compiled for the model.

    Raises:
        ApiError: 400: it cannot be enforced. 429: too many others are being compiled. 500: it cannot be tried here.
    """
    if serving.grammars is None:
        raise not_supported(name, f"{name} is not supported here.")
    try:
        compiling = await asyncio.to_thread(serving.grammars.submit, grammar)
        # Others may wait for the same: a client that leaves must not end it for them.
        return await asyncio.shield(asyncio.wrap_future(compiling))
    except GrammarError as error:
        raise refused(name, error) from error
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full", headers=RETRY_SOON) from error
    except ForerouteError as error:
        raise ApiError(500, str(error), param=name, code="internal_error") from error


def refused(name: str, error: GrammarError) -> ApiError:
    """Make a 400: the field `name` has what cannot be enforced."""
    return ApiError(400, f"{name}: {error}", param=name, code="invalid_grammar")


def _found(asked: "ChatRequest | CompletionRequest") -> "tuple[str, Grammar] | None":
    """Return the field that asks for structure, and its grammar.

    Raises:
        ApiError: there are two, or it is not what it should be.
    """
    given = {name: getattr(asked, name) for name in sorted(FIELDS) if getattr(asked, name) is not None}
    if given.get("response_format", {}).get("type", "") == "text":
        del given["response_format"]
    if not given:
        return None
    if len(given) > 1:
        raise not_possible(max(given), f"{' and '.join(given)} are both there. Give one of them.")
    ((name, value),) = given.items()
    try:
        if name == "response_format":
            return name, _of_format(value)
        if name == "structured_outputs":
            return name, _of_outputs(value)
        return name, _of(_MEANING[name], value, name)
    except GrammarError as error:
        raise refused(name, error) from error


def _of(meaning: str, value: Any, name: str) -> "Grammar":
    from foreroute.structured.grammar import Grammar

    makers: dict[str, tuple[Callable[[Any], Grammar], Callable[[Any], bool], str]] = {
        "json": (Grammar.json_schema, lambda one: isinstance(one, (dict, str, bool)), "a JSON schema"),
        "regex": (Grammar.regex, lambda one: isinstance(one, str), "a text"),
        "grammar": (Grammar.grammar, lambda one: isinstance(one, str), "a text"),
        "choice": (Grammar.choice, _are_texts, "a list of texts"),
    }
    make, fits, wanted = makers[meaning]
    if not fits(value):
        raise not_possible(name, f"{name} must be {wanted}.")
    return make(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _of_format(given: dict[str, Any]) -> "Grammar":
    """The grammar of OpenAI's response_format, and of what others put there."""
    kind = given.get("type")
    if kind == "json_object":
        # llama.cpp's and others': with a schema.
        schema = given.get("schema")
        return _of("json", {"type": "object"} if schema is None else schema, "response_format.schema")
    if kind == "json_schema":
        told = given.get("json_schema")
        schema = told.get("schema") if isinstance(told, dict) else given.get("schema")
        if schema is None:
            raise not_possible("response_format", "response_format json_schema has no json_schema.schema.")
        return _of("json", schema, "response_format.json_schema.schema")
    if kind == "regex":
        return _of("regex", given.get("pattern", given.get("value")), "response_format.pattern")
    if kind == "grammar":
        return _of("grammar", given.get("grammar"), "response_format.grammar")
    known = "text, json_object, json_schema, regex or grammar"
    raise not_possible("response_format", f"The type of response_format must be {known}.")


def _of_outputs(given: dict[str, Any]) -> "Grammar":
    """The grammar of vLLM's structured_outputs."""
    asked = {name: value for name, value in given.items() if value not in (None, False) and name not in _HINTS}
    if len(asked) != 1:
        raise not_possible(
            "structured_outputs", "structured_outputs needs one of json, regex, choice, grammar, json_object."
        )
    ((name, value),) = asked.items()
    if name == "json_object":
        return _of("json", {"type": "object"}, "structured_outputs.json_object")
    if name not in ("json", "regex", "choice", "grammar"):
        raise not_supported("structured_outputs", f"structured_outputs.{name[:40]} is not supported here.")
    return _of(name, value, f"structured_outputs.{name}")
