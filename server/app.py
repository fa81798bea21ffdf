"""The paths, and what holds for all of them: who is let in, how many at once, what an error looks like."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from .. import __version__
from ..r1.errors import UserError
from . import chat, completions, tokens
from .errors import ApiError, as_api_error
from .gate import Gate
from .metrics import Metrics
from .model import ServedModel
from .page import add_page
from .reply import Ask, Replies
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingFields, TokenizeRequest
from .settings import Settings
from .stream import EventStream, unless_gone
from .upstream_model import AnyModel, UpstreamModel

if TYPE_CHECKING:
    from .cluster import Cluster

log = logging.getLogger("stillhouse")
Body = TypeVar("Body", bound=BaseModel)
Asked = TypeVar("Asked", bound=SamplingFields)
_BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
HANGS_S = 300.0  # a step that takes longer will never end
_REFERENCE = "#/components/schemas/{model}"


class Service:
    """What the paths share: the model once it is loaded, the requests in flight, and whether we are stopping."""

    def __init__(self, settings: Settings, cluster: Cluster | None = None) -> None:
        self.settings = settings
        self.cluster = cluster  # that has the model, where it is not this process
        self.metrics = Metrics()
        self.draining = False
        self.live: dict[str, Replies] = {}  # the requests in flight, by their id
        self._model: AnyModel | None = None

    @property
    def model(self) -> AnyModel:
        """The model. Raises 503 while it is loading or the server is stopping."""
        if self.draining:
            raise ApiError(503, "the server is stopping", code="shutting_down", headers={"Retry-After": "5"})
        if self._model is None:
            raise ApiError(503, "the model is still loading", code="loading", headers={"Retry-After": "2"})
        if self.cluster and (trouble := self.cluster.trouble):
            words = f"the cluster is down: {trouble}; it is started again"
            raise ApiError(503, words, code="cluster_down", headers={"Retry-After": "5"})
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken now."""
        if self._model is None or self.draining or (self.cluster and self.cluster.trouble):
            return False
        return bool(self._model.engine.up) if isinstance(self._model, UpstreamModel) else True

    @property
    def is_loading(self) -> bool:
        """Whether there is no model yet."""
        return self._model is None

    @property
    def stuck_s(self) -> float:
        """How long the engine has been at the step that it is at now, in seconds."""
        return self._model.engine.activity.stuck_s if isinstance(self._model, ServedModel) else 0.0

    def ready(self, model: AnyModel) -> None:
        """Take requests from now on."""
        self._model = model
        if isinstance(model, UpstreamModel):
            self.metrics.serve_upstreams(model.name, model.engine)
            model.engine.watch_over()
        else:
            self.metrics.serve(model.name, model.engine)
        if self.cluster:
            self.metrics.serve_cluster(model.name, self.cluster)

    def close(self) -> None:
        """End what is in progress and give the model back."""
        self.draining = True
        if self.cluster:
            self.cluster.close()
        if self._model:
            self._model.engine.close()

    @property
    def in_flight(self) -> int:
        """Requests that run or wait."""
        return len(self.live)

    def check_room(self) -> None:
        """Raise 429 where all places are taken; before a prompt is encoded, which costs."""
        if self.in_flight >= self.settings.parallel + self.settings.max_waiting:
            raise ApiError(
                429,
                f"{self.settings.parallel} requests run and {self.settings.max_waiting} wait: no more are taken",
                code="queue_full",
                headers={"Retry-After": "2"},
            )

    def begin(self, ask: Ask) -> Replies:
        """Count a request in; `end` counts it out. Raises 429 where all places are taken."""
        self.check_room()
        replies = Replies(self.model, ask, self.metrics)
        self.live[replies.id] = replies
        return replies

    def end(self, replies: Replies) -> None:
        """Count a request out, however it ended."""
        self.live.pop(replies.id, None)


def create_app(service: Service) -> FastAPI:
    """The application around one `Service`."""
    app = FastAPI(title="Stillhouse", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_errors(app, service)
    _add_info(app, service)
    _add_generation(app, service)
    add_page(app)
    _describe(app)
    app.add_middleware(Gate, settings=service.settings, metrics=service.metrics)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await _read(request, ChatRequest)
        return await _generated(request, service, body, chat.chat_ask, chat.chat_whole, chat.chat_events)

    @app.post("/v1/chat/completions/{reply_id}/end_thinking")
    async def end_thinking(reply_id: str) -> dict[str, Any]:
        replies = service.live.get(reply_id.removeprefix("chatcmpl-"))
        if replies is None:
            words = f"no reply with the id {reply_id[:100]!r} is in progress"
            raise ApiError(404, words, code="reply_not_found", param="id")
        if not replies.can_end_thinking:
            words = "through this upstream the thoughts of this reply can't be ended: it could not be gone on with"
            raise ApiError(400, words, code="not_steerable", param="id")
        if not replies.end_thinking():
            words = f"the reply {reply_id[:100]!r} has ended its thoughts already"
            raise ApiError(409, words, code="not_thinking", param="id")
        return {"id": reply_id, "object": "chat.completion.end_thinking", "ending": True}

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest))
    async def text_completions(request: Request) -> Response:
        body = await _read(request, CompletionRequest)
        surface = completions.completion_ask, completions.completion_whole, completions.completion_events
        return await _generated(request, service, body, *surface)


def _add_info(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return _status(service)

    @app.get("/ready")
    async def ready() -> Response:
        return _status(service)

    @app.get("/health/ready")
    async def health_ready() -> Response:
        return _status(service)

    @app.get("/health/live")
    async def health_live() -> Response:
        stuck = service.stuck_s > HANGS_S
        return JSONResponse({"status": "stuck" if stuck else "ok"}, 503 if stuck else 200)

    @app.get("/cluster")
    async def cluster() -> dict[str, Any]:
        if service.cluster is None:
            raise ApiError(404, "this server has no cluster; `stillhouse cluster serve` starts one", code="no_cluster")
        return service.cluster.table()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [tokens.model_json(service.model)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        tokens.check_model(service.model, name)
        return tokens.model_json(service.model)

    @app.post("/tokenize", openapi_extra=_takes(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, TokenizeRequest)
        return await asyncio.to_thread(tokens.tokenize, service.model, body)

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, DetokenizeRequest)
        return await asyncio.to_thread(tokens.detokenize, service.model, body)


def _add_errors(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        if api_error.status == 500:
            log.exception("a request failed: %s %s", request.method, request.scope["path"], exc_info=error)
        service.metrics.refused.labels("", str(api_error.status)).inc()
        return api_error.response()

    for kind in (ApiError, UserError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


async def _read(request: Request, kind: type[Body]) -> Body:
    """The body as one of `schema`'s classes, straight from its bytes: NaN, half a surrogate and depth are errors."""
    data = await request.body()
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        # A form can be posted by any web page; JSON cannot without asking first.
        raise ApiError(415, f"the body must be application/json; this is {media[:100]}")
    try:
        return kind.model_validate_json(data)
    except ValueError as error:
        raise as_api_error(error) from None


async def _generated(
    request: Request,
    service: Service,
    body: Asked,
    ask: Callable[[AnyModel, Asked], Ask],
    gather: Callable[[AnyModel, Asked, Replies], Awaitable[dict[str, Any]]],
    write: Callable[[AnyModel, Asked, Replies], AsyncGenerator[bytes, None]],
) -> Response:
    """A reply by one surface's three functions: what is asked of the engine, and the reply whole or streamed."""
    model = service.model
    service.check_room()
    replies = service.begin(await asyncio.to_thread(ask, model, body))
    if body.stream:
        events, headers = write(model, body, replies), {"x-request-id": replies.id}
        return EventStream(events, headers=headers, at_end=lambda: service.end(replies))
    try:
        reply = await unless_gone(request, gather(model, body, replies))
    finally:
        service.end(replies)
    if reply is None:
        return Response(status_code=499)  # nobody is there to read it
    return JSONResponse(reply, headers={"x-request-id": reply["id"]})


def _status(service: Service) -> Response:
    if service.is_ready:
        return JSONResponse({"status": "ok"})
    down = "the cluster is down" if service.cluster else "no upstream is up"
    state = "stopping" if service.draining else "loading" if service.is_loading else down
    return JSONResponse({"status": state}, 503, headers={"Retry-After": "2"})


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Names the request's schema for `/openapi.json`; bodies are read by `_read`, of which FastAPI knows nothing."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe(app: FastAPI) -> None:
    """Put the requests' schemas where `_takes` says they are."""
    _, found = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_REFERENCE)
    page = app.openapi()
    page.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
