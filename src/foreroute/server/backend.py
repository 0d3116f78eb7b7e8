"""The model behind the routes: loading, ready, failed or stopping."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foreroute.batching.requests import Engine
from foreroute.server.api.problems import RETRY_SOON, ApiError, not_possible, not_supported
from foreroute.server.api.token_text import TokenTexts
from foreroute.server.dialogue.described import with_described_tools
from foreroute.server.dialogue.messages import Dialogue
from foreroute.server.dialogue.parsing.formats import Format, format_of
from foreroute.server.dialogue.rendering import TemplateError, template_input
from foreroute.server.dialogue.templates import TemplateRenderer
from foreroute.server.dialogue.turn import Turn, turn_of
from foreroute.server.settings import Limits
from foreroute.structured.reasoning import tags_of

if TYPE_CHECKING:
    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.server.watching.live import LiveFeed
    from foreroute.structured.compiler import GrammarCompiler


class Prompts:
    """Converts texts and messages to token ids.

    Args:
        tokenizer: of transformers. vocab_size: ids of a prompt must be below it.
        limits: of the chat template, which runs in a separate process.
        why_no_chat: why chats are refused, whatever the tokenizer has; "" where they are not.
        calls: the format of tool calls; None: the one that the template describes.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, limits: Limits, why_no_chat: str = "", calls: Format | None = None
    ) -> None:
        self._why_no_chat = why_no_chat
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        # A tokenizer changes its state while it encodes.
        self._lock = threading.Lock()
        self.texts = TokenTexts(tokenizer)
        template = getattr(tokenizer, "chat_template", None)
        self._no_template = "This model has no chat template. Use /v1/completions."
        if isinstance(template, dict):
            self._no_template = (
                f"This model has the chat templates {', '.join(sorted(map(str, template)))} and no default. Rename the "
                'one to be used to "default" in tokenizer_config.json; until then, use /v1/completions.'
            )
            template = template.get("default")
        self.template: str | None = template
        self._calls = calls or (None if template is None else format_of(template))
        # Where this format was chosen, a template without a place for tools is no obstacle.
        self._describes_tools = calls is not None and calls.name == "hermes"
        self._thinks = None if template is None else tags_of(template)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._renderer = None if template is None else TemplateRenderer(template, special, limits)

    def start(self) -> None:
        """Start the process that renders templates; started later, it would delay the first request by a second."""
        if self._renderer is not None:
            self._renderer.start()
            # A template that cannot be used is told of by the requests that need it.
            with contextlib.suppress(ApiError):
                self._renderer.reading()

    def calls_in_words(self) -> str:
        """Whether tools can be called, and the format of the calls, for people. Blocks, as rendering does."""
        if self._renderer is None:
            return "no: there is no chat template"
        try:
            has_tools = self._renderer.reading().has_tools
        except ApiError as error:
            return f"no: {error.message}"
        if not has_tools and self._describes_tools:
            return "hermes, described in the system's message"
        if not has_tools:
            return "no: the chat template has no place for them"
        return "their format is not known: say --tool-parser NAME" if self._calls is None else self._calls.name

    def close(self) -> None:
        """End the template process."""
        if self._renderer is not None:
            self._renderer.close()

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Return the tokens of a text.

        Args:
            add_special_tokens: as the tokenizer's. param: the field of the text, for errors.
        Raises:
            ApiError: the tokenizer yields a token that the model lacks (one added to the tokenizer alone).
        """
        token_ids = await asyncio.to_thread(self._encode, text, add_special_tokens)
        self.check_ids(token_ids, param)
        return token_ids

    async def chat(self, dialogue: Dialogue) -> Turn:
        """Return the turn that follows a conversation: its tokens up to where the answer begins, and how it is read.

        Raises:
            ApiError: chats are refused, there is no chat template, it refuses the messages, or has no place for what is
                asked.
        """
        if self._why_no_chat:
            raise not_possible("messages", self._why_no_chat)
        if self._renderer is None:
            raise not_possible("messages", self._no_template)
        rendered = await asyncio.to_thread(self._render, self._renderer, dialogue)
        ids = await self.encode(rendered, add_special_tokens=False, param="messages")
        turn = turn_of(dialogue, rendered, ids, self._calls, self._thinks)
        if dialogue.thinking.wants_none and (turn.is_open or (turn.format is not None and turn.format.has_channels)):
            raise not_supported("reasoning_effort", "This model always reasons: its template has no switch for it.")
        return turn

    def _render(self, renderer: TemplateRenderer, dialogue: Dialogue) -> str:
        reading = renderer.reading()
        if self._describes_tools and not reading.has_tools:
            dialogue = with_described_tools(dialogue)
        try:
            given = template_input(dialogue, self.template or "", reading)
        except TemplateError as error:
            raise not_supported(error.field, str(error)) from error
        if given.tools and self._calls is None:
            raise not_supported(
                "tools", "The format of this model's tool calls is not known. Serve it with --tool-parser NAME."
            )
        return renderer.render(given.messages, given.tools, given.variables)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with this text; None where it is no special token."""
        from foreroute.model.text import special_ids  # not before the server listens: torch comes with it

        with self._lock:
            return special_ids(self._tokenizer).get(text)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Decode tokens to text, special ones included."""
        return await asyncio.to_thread(self._decode, token_ids)

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Check that the model has all of token_ids.

        Raises:
            ApiError: it lacks one; the error names the field `param`.
        """
        if token_ids and max(token_ids) >= self._vocab_size:
            raise not_possible(param, f"{param} has the token {max(token_ids)}; ids end at {self._vocab_size - 1}.")

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        from foreroute.model.text import with_one_start  # not before the server listens: torch comes with it

        with self._lock:
            ids = list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
            return with_one_start(self._tokenizer, text, ids) if add_special_tokens else ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        with self._lock:
            return self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )


@dataclass
class Serving:
    """A model that is ready to answer.

    context: tokens of prompt and answer together. info: the answer of /tokenizer_info. model: as loaded, or None
    (tests); expert metrics and the live page read its `foreroute`. live_feed: the live page's, from its first viewer
    on. grammars: compiles those of structured output. created: when it was loaded.
    """

    engine: Engine
    prompts: Prompts
    context: int
    info: dict[str, Any] = field(default_factory=dict)
    model: "OffloadedModel | None" = None
    live_feed: "LiveFeed | None" = None
    grammars: "GrammarCompiler | None" = None
    created: int = field(default_factory=lambda: int(time.time()))

    def end_requests(self) -> None:
        """End all requests, those whose grammars are compiled too."""
        if self.grammars is not None:
            self.grammars.close()
        self.engine.close()

    def close(self) -> None:
        """End all requests and the processes that prepare them. A second call does nothing."""
        self.end_requests()
        self.prompts.close()


class Backend:
    """The model behind the routes, which exist before it is loaded.

    Attributes:
        phase: loading, ready, failed or stopping. step: the current activity, for people. progress: 0 to 1.
    """

    def __init__(self, serving: Serving | None = None) -> None:
        self.phase, self.step, self.progress = "loading", "starting", 0.0
        self._serving: Serving | None = None
        # Loading and stopping run in different threads: the second must see what the first did.
        self._lock = threading.Lock()
        if serving is not None:
            self.ready(serving)

    def report(self, step: str, progress: float) -> None:
        """Record how far loading is: the current `step`, and its progress, 0 to 1."""
        with self._lock:
            if self.phase != "stopping":
                self.step, self.progress = step, progress

    def ready(self, serving: Serving) -> None:
        """Answer requests from now on. A model that is ready only after `stop` is closed: no caller would do it."""
        with self._lock:
            is_late = self.phase == "stopping"
            if not is_late:
                self._serving, self.phase, self.step, self.progress = serving, "ready", "ready", 1.0
        if is_late:
            serving.close()

    def fail(self, why: str) -> None:
        """Record that loading failed."""
        with self._lock:
            if self.phase != "stopping":
                self.phase, self.step = "failed", why

    def stop(self) -> None:
        """Take no further requests."""
        with self._lock:
            self.phase, self.step = "stopping", "stopping"

    @property
    def loaded(self) -> Serving | None:
        """The model, also while stopping; None before it is ready."""
        return self._serving

    def serving(self) -> Serving:
        """Return the model for a request, or ask to come back.

        Raises:
            ApiError: 503 with Retry-After: not ready yet, or stopping.
        """
        if self.phase != "ready" or self._serving is None:
            message = f"The model is not ready: {self.phase} ({self.step}). GET /health says when."
            raise ApiError(503, message, code=self.phase, headers=RETRY_SOON)
        return self._serving
