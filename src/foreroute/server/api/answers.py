"""Pass requests from the event loop to the engine's thread and events back, and free everything at the end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import AnswerEvent, Engine, Finished, NewToken, PromptScored, Request, Sampling
from foreroute.errors import ContextLengthError, ForerouteError, QueueFullError
from foreroute.server.api.problems import RETRY_SOON, ApiError, not_possible
from foreroute.server.api.schema import ChatRequest, CompletionRequest
from foreroute.server.api.sse import until_gone
from foreroute.server.settings import Limits, ServerSettings
from foreroute.server.watching.metrics import RequestClock, ServerMetrics


class Answers:
    """Several requests of one HTTP request, and their events as they arrive: `async for index, event in answers`.

    Use it in a `with`: requests that have not ended at its exit are cancelled.

    Args:
        engine: computes the answers. requests: one for each choice, in the order of their indices.
        metrics: called when tokens arrive. settings: limits.
        param: the field of the prompts, for errors.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        metrics: ServerMetrics,
        settings: ServerSettings,
        param: str,
    ) -> None:
        self._param = param
        self._engine, self._requests, self._metrics, self._settings = engine, requests, metrics, settings
        self._events: asyncio.Queue[tuple[int, AnswerEvent]] = asyncio.Queue()
        self._open: dict[int, tuple[Any, RequestClock]] = {}

    def submit(self) -> None:
        """Queue all requests, or none.

        Raises:
            ApiError: 429 when the queue is full, 400 when one is longer than the context.
        """
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self._requests):
                clock = self._metrics.begin()
                # The handle is stored in the loop's thread, before that can see an event.
                handle = self._engine.submit(request, partial(self._arrived, loop, clock, index))
                self._open[index] = (handle, clock)
        except QueueFullError as error:
            self.close()
            raise ApiError(429, str(error), code="queue_full", headers=RETRY_SOON) from error
        except ContextLengthError as error:
            self.close()
            raise ApiError(400, str(error), param=self._param, code="context_length_exceeded") from error
        except ForerouteError as error:
            self.close()
            raise ApiError(400, str(error), param=self._param, code="invalid_value") from error

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the first request's prompt."""
        return len(self._requests[0].prompt_ids)

    def close(self) -> None:
        """Cancel all requests that have not ended."""
        for handle, clock in self._open.values():
            self._engine.cancel(handle)
            clock.abandoned()
        self._open.clear()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[tuple[int, AnswerEvent]]:
        """Yield events until every request has ended.

        Raises:
            ApiError: a request failed.
        """
        while self._open:
            index, event = await self._events.get()
            if isinstance(event, Finished):
                _, clock = self._open.pop(index)
                clock.finished(event.reason, event.prompt_tokens)
                if event.reason not in ("stop", "length"):
                    what = event.error or f"The answer was ended: {event.reason}."
                    if event.is_refusal:
                        raise ApiError(400, what, code="invalid_grammar")
                    status = 503 if event.reason == "cancelled" else 500
                    raise ApiError(status, what, code="engine_error")
            yield index, event

    def _arrived(self, loop: asyncio.AbstractEventLoop, clock: RequestClock, index: int, event: AnswerEvent) -> None:
        """Pass an event to the loop; runs in the engine's thread."""
        if isinstance(event, NewToken):
            clock.token()
        # When the server stops, the loop ends before the engine does.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


class Choice:
    """The text and tokens of an answer so far, collected from its events."""

    def __init__(self) -> None:
        self.text = ""
        self.steps: list[NewToken] = []
        self.prompt: PromptScored | None = None
        self.end: Finished | None = None

    def add(self, event: AnswerEvent) -> None:
        """Add one event."""
        if isinstance(event, NewToken):
            self.text += event.text
            self.steps.append(event)
        elif isinstance(event, PromptScored):
            self.prompt = event
        elif isinstance(event, Finished):
            self.text += event.text
            self.end = event


_ChoiceT = TypeVar("_ChoiceT", bound=Choice)


async def gather(http: HttpRequest, answers: Answers, new_choice: Callable[[], _ChoiceT]) -> list[_ChoiceT] | None:
    """Collect all choices of `answers` in full; None when the client of `http` has left, which cancels them.

    Args:
        new_choice: makes an empty one.

    Raises:
        ApiError: a request failed.
    """

    async def collect() -> list[_ChoiceT]:
        choices = [new_choice() for _ in answers._requests]
        async for index, event in answers:
            choices[index].add(event)
        return choices

    collecting = asyncio.ensure_future(collect())
    watching = asyncio.ensure_future(until_gone(http.receive))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        for task in (collecting, watching):
            task.cancel()
        await asyncio.gather(collecting, watching, return_exceptions=True)
        answers.close()


def usage(choices: Sequence[Choice], num_choices: int = 1) -> dict[str, Any]:
    """Build OpenAI's usage object. `choices` go prompt by prompt, num_choices each; a prompt's tokens count once."""
    ends = [choice.end for choice in choices if choice.end is not None]
    prompts = ends[::num_choices]
    prompt_tokens = sum(end.prompt_tokens for end in prompts)
    completion_tokens = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)},
    }


def sampling_of(asked: ChatRequest | CompletionRequest, settings: ServerSettings, index: int) -> Sampling:
    """Sampling of choice `index` of a prompt, as `asked`, else by `settings`.

    Raises:
        ApiError: an invalid logit_bias.
    """
    seed = settings.seed if asked.seed is None else asked.seed
    return Sampling(
        temperature=settings.temperature if asked.temperature is None else asked.temperature,
        top_p=asked.top_p,
        top_k=0 if asked.top_k == -1 else asked.top_k,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=_bias(asked.logit_bias or {}, settings.limits.logit_bias),
        min_tokens=asked.min_tokens or 0,
        # Choices of a seeded request differ from each other, and are the same each time.
        seed=None if seed is None else (seed + index) % 2**63,
    )


def check_counts(asked: ChatRequest | CompletionRequest, settings: ServerSettings) -> list[str]:
    """Check that n, stop and min_tokens as `asked` are within the limits of `settings`, and return the stop texts.

    Raises:
        ApiError: one of them is not.
    """
    limits = settings.limits
    if (asked.n or 1) > limits.choices:
        raise not_possible("n", f"n is {asked.n}; at most {limits.choices} answers are given.")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if asked.most_new is not None and (asked.min_tokens or 0) > asked.most_new:
        raise not_possible("min_tokens", f"min_tokens is {asked.min_tokens}, and at most {asked.most_new} are given.")
    return check_stops("stop", stop, limits.stop, limits)


def check_stops(name: str, stop: Sequence[str], most: int, limits: Limits) -> list[str]:
    """Return the stop texts of the field `name`, each of them once; `most` may be given.

    Raises:
        ApiError: they are too many, or too long.
    """
    if len(stop) > most:
        raise not_possible(name, f"{name} has {len(stop)} texts; at most {most} are watched for.")
    if any(len(text) > limits.stop_chars for text in stop):
        raise not_possible(name, f"A stop text is longer than {limits.stop_chars} characters.")
    # lm-eval sends an empty stop text for models without an end token; obeying it would end every answer at once.
    return [text for text in dict.fromkeys(stop) if text]


def biased_ids(asked: ChatRequest | CompletionRequest, settings: ServerSettings) -> list[int]:
    """Return the token ids of the logit_bias that was `asked`, valid by `settings`.

    Raises:
        ApiError: an invalid logit_bias.
    """
    return list(_bias(asked.logit_bias or {}, settings.limits.logit_bias))


def check_model(asked: str | None, settings: ServerSettings) -> str:
    """Return the model name for the answer: as `asked`, else the first of `settings`.

    Raises:
        ApiError: 404: there is no model of this name.
    """
    if asked is None:
        return settings.served_names[0]
    if asked not in settings.served_names:
        known = ", ".join(settings.served_names)
        raise ApiError(404, f"There is no such model here. Served: {known}.", param="model", code="model_not_found")
    return asked


def _bias(asked: dict[str, float], most: int) -> dict[int, float]:
    if len(asked) > most:
        raise not_possible("logit_bias", f"logit_bias has {len(asked)} entries; at most {most} are taken.")
    if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in asked):
        raise not_possible("logit_bias", "The keys of logit_bias must be token ids.")
    if not all(-100 <= value <= 100 for value in asked.values()):
        raise not_possible("logit_bias", "The values of logit_bias must be within -100 and 100.")
    bias = {int(name): value for name, value in asked.items()}
    if len(bias) < len(asked):
        raise not_possible("logit_bias", "logit_bias has a token more than once (leading zeros do not count).")
    return bias
