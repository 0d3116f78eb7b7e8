"""The routes. `create_app` makes the whole server behind its guard; uvicorn runs it."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

import foreroute
from foreroute.server.api import problems
from foreroute.server.api.answers import check_model
from foreroute.server.api.chat import complete_chat
from foreroute.server.api.chat_messages import messages_of, tools_of
from foreroute.server.api.completions import complete
from foreroute.server.api.messages.answer import answer_messages, count_tokens
from foreroute.server.api.messages.schema import CountRequest, MessagesRequest
from foreroute.server.api.problems import RETRY_SOON, ApiError
from foreroute.server.api.responses.answer import answer_responses
from foreroute.server.api.responses.schema import ResponsesRequest
from foreroute.server.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from foreroute.server.backend import Backend, Serving
from foreroute.server.dialogue.messages import Dialogue
from foreroute.server.guard import Guard
from foreroute.server.paths import UsualPaths
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics

# nginx's "client closed request"; the client never sees it.
_CLIENT_LEFT = 499
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PROBLEM = {"description": "What is wrong, in the API's shape", "content": {"application/json": {}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503), _PROBLEM
)
_ALSO_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer", "content": {"application/json": {}, "text/event-stream": {}}}
}

# Adds further routes to the app (the page): called with app, backend and settings.
AddRoutes = Callable[[FastAPI, Backend, ServerSettings], None]


def create_app(backend: Backend, settings: ServerSettings, more: Sequence[AddRoutes] = ()) -> Guard:
    """Make the server as an ASGI application, as `settings` say.

    Args:
        backend: the model, which may still be loading.
        more: functions that add routes; the guard covers these too.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        backend.stop()

    app = FastAPI(
        title="foreroute",
        version=foreroute.__version__,
        description="OpenAI's and Anthropic's APIs for a model whose experts do not fit the memory.",
        lifespan=lifespan,
        # Their pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_PROBLEMS,
    )
    metrics = ServerMetrics(backend)
    problems.add_handlers(app)
    _add_openai(app, backend, settings, metrics)
    _add_anthropic(app, backend, settings, metrics)
    _add_tokens(app, backend, settings)
    _add_state(app, backend, settings, metrics)
    for add in more:
        add(app, backend, settings)
    return Guard(UsualPaths(app), settings)


def _add_openai(app: FastAPI, backend: Backend, settings: ServerSettings, metrics: ServerMetrics) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        serving = backend.serving()
        return {"object": "list", "data": [_model_card(name, serving) for name in settings.served_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        serving = backend.serving()
        if name not in settings.served_names:
            raise ApiError(404, "There is no such model here.", param="model", code="model_not_found")
        return _model_card(name, serving)

    @app.post("/v1/chat/completions", response_model=None, responses=_ALSO_STREAMED)
    async def chat_completions(asked: ChatRequest, http: Request) -> Any:
        return _answer(await complete_chat(asked, http, backend.serving(), metrics, settings))

    @app.post("/v1/completions", response_model=None, responses=_ALSO_STREAMED)
    async def completions(asked: CompletionRequest, http: Request) -> Any:
        return _answer(await complete(asked, http, backend.serving(), metrics, settings))

    @app.post("/v1/responses", response_model=None, responses=_ALSO_STREAMED)
    async def responses(asked: ResponsesRequest, http: Request) -> Any:
        return _answer(await answer_responses(asked, http, backend.serving(), metrics, settings))


def _add_anthropic(app: FastAPI, backend: Backend, settings: ServerSettings, metrics: ServerMetrics) -> None:
    @app.post("/v1/messages", response_model=None, responses=_ALSO_STREAMED)
    async def messages(asked: MessagesRequest, http: Request) -> Any:
        return _answer(await answer_messages(asked, http, backend.serving(), metrics, settings))

    @app.post("/v1/messages/count_tokens")
    async def message_tokens(asked: CountRequest) -> dict[str, int]:
        return await count_tokens(asked, backend.serving(), settings)


def _add_tokens(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        check_model(asked.model, settings)
        serving = backend.serving()
        if asked.messages is not None:
            dialogue = Dialogue(messages_of(asked.messages), tools_of(asked.tools or []))
            ids = list((await serving.prompts.chat(dialogue)).prompt_ids)
        else:
            ids = await serving.prompts.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        strings = [serving.prompts.texts.text(one) for one in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": serving.context, "tokens": ids, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> dict[str, Any]:
        check_model(asked.model, settings)
        serving = backend.serving()
        serving.prompts.check_ids(asked.tokens, "tokens")
        return {"prompt": await serving.prompts.decode(asked.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return backend.serving().info


def _add_state(app: FastAPI, backend: Backend, settings: ServerSettings, metrics: ServerMetrics) -> None:
    # Load balancers use HEAD.
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"status": "ok" if backend.phase == "ready" else backend.phase, "phase": backend.phase}
        state_now = {**state, "step": backend.step, "progress": backend.progress}
        if backend.phase == "ready":
            return JSONResponse(state_now)
        return JSONResponse(state_now, 503, RETRY_SOON)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": foreroute.__version__}

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.expose(), media_type=_METRICS_TYPE)


def _answer(found: Any) -> Any:
    return Response(status_code=_CLIENT_LEFT) if found is None else found


def _model_card(name: str, serving: Serving) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "foreroute",
        "max_model_len": serving.context,
    }
