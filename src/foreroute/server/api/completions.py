"""POST /v1/completions: continue prompts given as text or token ids; with echo, score the prompts too."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import Finished, NewToken, PromptScored, Request, Top
from foreroute.server.api.answers import (
    Answers,
    Choice,
    biased_ids,
    check_counts,
    check_model,
    gather,
    sampling_of,
    usage,
)
from foreroute.server.api.chat import finite
from foreroute.server.api.problems import not_possible
from foreroute.server.api.schema import CompletionRequest
from foreroute.server.api.sse import EventStream
from foreroute.server.api.structure import grammar_for
from foreroute.server.api.token_text import TokenTexts
from foreroute.server.backend import Serving
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics

_MOST_NEW = 16


async def complete(
    asked: CompletionRequest, http: HttpRequest, serving: Serving, metrics: ServerMetrics, settings: ServerSettings
) -> dict[str, Any] | EventStream | None:
    """Answer `asked` by `serving`, or stream; None if the client of `http` has left. metrics, settings: see `Answers`.

    Choices are numbered prompt by prompt: choice j of prompt i is i * n + j.

    Raises:
        ApiError: the request cannot be served; nothing has been queued.
    """
    name, stop = check_model(asked.model, settings), check_counts(asked, settings)
    serving.prompts.check_ids(biased_ids(asked, settings), "logit_bias")
    prompts = await _prompts(asked, serving, settings)
    n = asked.n or 1
    if n * len(prompts) > settings.limits.prompts:
        raise not_possible("n", f"{len(prompts)} prompts x n {n} is more than {settings.limits.prompts} answers.")
    grammar = await grammar_for(asked, serving)
    requests = [
        Request(
            prompt_ids=prompt_ids,
            max_new_tokens=_MOST_NEW if asked.max_tokens is None else asked.most_new,
            sampling=sampling_of(asked, settings, index),
            stop=stop,
            num_top_logprobs=asked.logprobs,
            wants_prompt_scores=bool(asked.echo) and asked.logprobs is not None,
            ignore_eos=bool(asked.ignore_eos),
            grammar=grammar,
        )
        for prompt_ids, _ in prompts
        for index in range(n)
    ]
    answers = Answers(serving.engine, requests, metrics, settings, "prompt")
    answers.submit()
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": name
    }  # fmt: skip
    shown = [_Shown(asked, text, prompt_ids, serving.prompts.texts) for prompt_ids, text in prompts for _ in range(n)]
    if asked.stream:
        return EventStream(_chunks(answers, asked, head, shown), settings, answers.close)
    choices = await gather(http, answers, Choice)
    if choices is None:
        return None
    return {
        **head,
        "choices": [one.whole(index, choice) for index, (one, choice) in enumerate(zip(shown, choices, strict=True))],
        "usage": usage(choices, n),
    }


async def _prompts(asked: CompletionRequest, serving: Serving, settings: ServerSettings) -> list[tuple[list[int], str]]:
    """Return token ids and text of every prompt.

    Raises:
        ApiError: no prompt, an empty one, too many, or token ids that the model does not have.
    """
    given: list[Any] = [asked.prompt]
    if isinstance(asked.prompt, list) and (not asked.prompt or not isinstance(asked.prompt[0], int)):
        given = asked.prompt
    if not given:
        raise not_possible("prompt", "There is no prompt.")
    if len(given) > settings.limits.prompts:
        raise not_possible("prompt", f"There are {len(given)} prompts; at most {settings.limits.prompts} are taken.")
    prompts = []
    for one in given:
        if isinstance(one, str):
            ids, text = await serving.prompts.encode(one), one
        else:
            serving.prompts.check_ids(one, "prompt")
            ids, text = one, await serving.prompts.decode(one) if asked.echo else ""
        if not ids:
            raise not_possible("prompt", "A prompt is empty: there is no token to start from.")
        prompts.append((ids, text))
    return prompts


class _Shown:
    """Formats one choice: with its echo and logprobs as requested, and how much text has been sent."""

    def __init__(self, asked: CompletionRequest, prompt: str, prompt_ids: list[int], texts: TokenTexts) -> None:
        self._echo = prompt if asked.echo else ""
        self._has_logprobs, self._prompt_ids, self._texts = asked.logprobs is not None, prompt_ids, texts
        self._has_echo = bool(asked.echo)
        self._offset = 0
        # Tokens whose text is held back: part of a character, or what may become a stop text.
        self._held: list[NewToken] = []

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """Format the whole choice at once."""
        assert choice.end is not None
        logprobs = self._logprobs(choice.prompt, choice.steps)
        return {
            "index": index, "text": self._echo + choice.text, "logprobs": logprobs, "finish_reason": choice.end.reason
        }  # fmt: skip

    def start(self, index: int, scored: PromptScored | None) -> dict[str, Any]:
        """Format a stream's first piece: the prompt, where echo was requested."""
        logprobs = self._logprobs(scored, [])
        return {"index": index, "text": self._echo, "logprobs": logprobs, "finish_reason": None}

    def piece(self, index: int, event: NewToken | Finished) -> list[dict[str, Any]]:
        """Format the pieces for a token or the end: none while its text is held back."""
        if isinstance(event, NewToken):
            self._held.append(event)
        is_last = isinstance(event, Finished)
        pieces: list[dict[str, Any]] = []
        if event.text or (is_last and self._held and self._has_logprobs):
            logprobs = self._logprobs(None, self._held)
            pieces.append({"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": None})
            self._held = []
        if isinstance(event, Finished):
            pieces.append({"index": index, "text": "", "logprobs": None, "finish_reason": event.reason})
        return pieces

    @property
    def waits_for_scores(self) -> bool:
        """Whether the first piece needs the prompt's scores."""
        return self._has_echo and self._has_logprobs

    @property
    def has_echo(self) -> bool:
        """Whether there is a first piece."""
        return self._has_echo

    def _logprobs(self, scored: PromptScored | None, steps: Sequence[NewToken]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        rows: list[tuple[int, float | None, Top | None]] = [(one.token_id, one.logprob, one.top) for one in steps]
        if scored is not None:
            rows = list(zip(self._prompt_ids, scored.logprobs, scored.top, strict=True)) + rows
        offsets = []
        for token_id, _, _ in rows:
            offsets.append(self._offset)
            # In UTF-8, every byte that is no continuation byte starts a character.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in self._texts.bytes(token_id))
        return {
            "tokens": [self._texts.name(token_id) for token_id, _, _ in rows],
            "token_logprobs": [finite(logprob) for _, logprob, _ in rows],
            "top_logprobs": [None if logprob is None else self._top(*row) for row in rows for logprob in (row[1],)],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: float | None, top: Top | None) -> dict[str, float | None]:
        """The likeliest tokens and the chosen one, by name."""
        rows = dict(top or ())
        rows.setdefault(token_id, logprob if logprob is not None else 0.0)
        return dict(zip(self._texts.unique(list(rows)), map(finite, rows.values()), strict=True))


async def _chunks(
    answers: Answers, asked: CompletionRequest, head: dict[str, Any], shown: list[_Shown]
) -> AsyncIterator[dict[str, Any]]:
    if asked.wants_usage:
        head = {**head, "usage": None}
    choices = [Choice() for _ in shown]
    with answers:
        for index, one in enumerate(shown):
            if one.has_echo and not one.waits_for_scores:
                yield {**head, "choices": [one.start(index, None)]}
        async for index, event in answers:
            choices[index].add(event)
            if isinstance(event, PromptScored):
                yield {**head, "choices": [shown[index].start(index, event)]}
            elif isinstance(event, (NewToken, Finished)):
                for piece in shown[index].piece(index, event):
                    yield {**head, "choices": [piece]}
        if asked.wants_usage:
            yield {**head, "choices": [], "usage": usage(choices, asked.n or 1)}
