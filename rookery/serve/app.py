"""The routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from rookery import __version__
from rookery.errors import UserError
from rookery.i18n import _
from rookery.infer import Closed
from rookery.serve.answers import ChatWriter, CompletionWriter, Frame, dump, embeddings
from rookery.serve.errors import ApiError
from rookery.serve.guard import Guard
from rookery.serve.mounts import Mount
from rookery.serve.schema import (
    ChatCompletion,
    ChatRequest,
    Choosing,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Mounted,
    MountList,
    MountRequest,
    Unmounted,
)
from rookery.serve.service import GRACE, Job, Service

Kind = Literal["state", "adapter"]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": about}
    for status, about in {
        400: "The request cannot be served as it is",
        401: "No valid key",
        403: "Not allowed from there, or not at all",
        404: "There is no such thing",
        408: "The request did not arrive in time",
        413: "The request is too large",
        429: "Everything is taken; `Retry-After` says when to try again",
        500: "The server is at fault",
        503: "The server is ending, or the request waited too long",
    }.items()
}

CLIENT_CLOSED = 499
"""Status of a request whose client went away; nobody reads it but the metrics."""


def create_app(
    service: Service,
    *,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    keys: Collection[str] = (),
) -> FastAPI:
    """The application for one model; see `Guard` for who may use it."""
    guard = Middleware(
        Guard,
        metrics=service.metrics,
        hosts=hosts,
        origins=origins,
        keys=keys,
        body=service.limits.body,
        seconds=service.limits.body_seconds,
    )
    cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app = FastAPI(
        title="Rookery",
        description="An RWKV model behind OpenAI's API.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=[guard, cors] if origins else [guard],
        responses=ERRORS,
    )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    _add_models(app, service)
    _add_answers(app, service)
    _add_mounts(app, service, "state")
    _add_mounts(app, service, "adapter")
    _add_monitoring(app, service)
    _describe(app)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    card = ModelCard(id=service.name, object="model", created=service.created, owned_by="rookery")

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        return _json(ModelList(object="list", data=[card]))

    @app.get("/v1/models/{model:path}", response_model=ModelCard)
    async def show_model(model: str) -> Response:
        service.check_model(model)
        return _json(card)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def answer_chat(request: Request, asked: ChatRequest) -> Response:
        service.check_model(asked.model)
        job = service.admit(asked.n or 1)
        try:
            chat = await job.prepare(lambda: service.prompter.chat(asked))
            handles = await job.submit(chat.requests, asked.state, asked.adapter)
        except BaseException:
            job.close()
            raise
        frame = Frame(service.name, service.prompter.tokenizer, asked.n or 1, "chatcmpl")
        return await _respond(request, asked, job, ChatWriter(frame, chat, handles))

    @app.post("/v1/completions", response_model=Completion)
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        service.check_model(asked.model)
        several = isinstance(asked.prompt, list) and not isinstance(asked.prompt[0], int)
        job = service.admit((len(asked.prompt) if several else 1) * (asked.n or 1))
        try:
            completions = await job.prepare(lambda: service.prompter.completion(asked))
            handles = await job.submit(completions.requests, asked.state, asked.adapter)
        except BaseException:
            job.close()
            raise
        frame = Frame(service.name, service.prompter.tokenizer, asked.n or 1, "cmpl")
        return await _respond(request, asked, job, CompletionWriter(frame, completions, handles))

    @app.post("/v1/embeddings", response_model=Embeddings)
    async def embed(request: Request, asked: EmbeddingRequest) -> Response:
        service.check_model(asked.model)
        width = service.engine.model.shape.n_embd
        if asked.dimensions not in (None, width):
            raise ApiError(400, _("This model's vectors have {width} dimensions.", width=width), param="dimensions")
        job = service.admit(1)
        try:
            inputs = await job.prepare(lambda: service.prompter.embedding(asked))

            async def vectors() -> Embeddings:
                # One after another: a prompt is read in parallel form, which leaves nothing to gain from several.
                handles = []
                for one in inputs:
                    [handle] = await job.submit([one], asked.state, asked.adapter)
                    async for _piece in job.pieces([handle]):
                        pass
                    handles.append(handle)
                return embeddings(service.name, handles, asked.encoding_format or "float")

            return await _unless_gone(request, vectors())
        finally:
            job.close()


async def _respond(request: Request, asked: Choosing, job: Job, writer: ChatWriter | CompletionWriter) -> Response:
    pieces = job.pieces(writer.handles)
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return EventStream(job, writer.events(pieces, with_usage))
    try:
        return await _unless_gone(request, writer.whole(pieces))
    finally:
        job.close()


async def _unless_gone(request: Request, work: Awaitable[BaseModel]) -> Response:
    """The answer, or nothing if the client goes away before it is there."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return _json(answer.result()) if answer.done() else Response(status_code=CLIENT_CLOSED)
    finally:
        gone.cancel()
        answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, so does the job."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(_framed(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._job.deadline + GRACE):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # a client that reads too slowly has had its time
        finally:
            self._job.close()


async def _framed(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {event}\n\n"
            # Where several pieces wait already, nothing else would let the loop notice that the client is gone.
            await asyncio.sleep(0)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"


def _add_mounts(app: FastAPI, service: Service, kind: Kind) -> None:
    path = f"/v1/{kind}s"
    mounts = service.mounts(kind)

    def shown(mount: Mount) -> Mounted:
        return Mounted(id=mount.name, object=kind, created=mount.created, file=mount.file)

    @app.get(path, response_model=MountList, operation_id=f"list_{kind}s")
    async def show() -> Response:
        available = await asyncio.to_thread(mounts.available)
        return _json(MountList(object="list", data=[shown(mount) for mount in mounts.all], available=available))

    @app.post(path, response_model=Mounted, operation_id=f"mount_{kind}")
    async def mount(asked: MountRequest) -> Response:
        if service.draining:
            raise service.ending()
        try:
            file = mounts.allowed(asked.file)
            return _json(shown(await asyncio.to_thread(mounts.add, asked.name, file)))
        except PermissionError as error:
            raise ApiError(403, str(error), param="file") from error
        except FileNotFoundError as error:
            raise ApiError(404, str(error), param="file") from error
        except Closed as error:
            raise service.ending() from error
        except UserError as error:
            raise ApiError(400, str(error).replace(str(file), asked.file), param="file") from error

    @app.delete(path + "/{name}", response_model=Unmounted, operation_id=f"unmount_{kind}")
    async def unmount(name: str) -> Response:
        if not mounts.remove(name):
            raise ApiError(404, _("Nothing called {name} is mounted.", name=name[:200]))
        return _json(Unmounted(id=name, object=kind, deleted=True))


def _add_monitoring(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health)
    async def health() -> Response:
        load = service.engine.load
        status = "draining" if service.draining else "ok"
        body = Health(status=status, model=service.name, slots=load.slots, active=load.active, waiting=load.waiting)
        return _json(body, 503 if service.draining else 200)

    @app.head("/health", include_in_schema=False)
    async def health_alone() -> Response:
        return await health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(dump(answer), status, media_type="application/json")


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, with the field's name as a client wrote it."""
    assert isinstance(error, RequestValidationError)
    # Of the alternatives of a union, that whose kind is right was meant, else the one that got furthest.
    worst = max(error.errors(), key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    param = ".".join(_steps(worst["loc"][1:], error.body))
    if worst["type"] == "json_invalid":
        return ApiError(400, _("The request is no valid JSON: {reason}", reason=worst["ctx"]["error"])).response()
    if not param and "json" not in request.headers.get("content-type", ""):
        return ApiError(400, _("The request needs the header Content-Type: application/json.")).response()
    if worst["type"] == "extra_forbidden":
        message = _("Unknown field: {name}", name=param)
        return ApiError(400, message, param=param, code="unknown_parameter").response()
    return ApiError(400, f"{param}: {worst['msg']}" if param else worst["msg"], param=param or None).response()


def _steps(place: Sequence[str | int], value: Any) -> Iterator[str]:
    """The steps of a place that a client knows: between them stand the names of the alternatives of unions."""
    for number, step in enumerate(place, 1):
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            yield str(step)
            value = value[step]  # type: ignore[index]  # of one of the two kinds
        elif isinstance(value, dict) and number == len(place):  # a field that is missing
            yield str(step)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = _("There is nothing at {path}; /openapi.json lists what there is.", path=request.url.path[:200])
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        # Starlette names the methods of the first route of this path only.
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        response.headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    return response


async def _fault(_request: Request, _error: Exception) -> Response:
    return ApiError(500, _("The server is at fault; its log says why.")).response()


def _describe(app: FastAPI) -> None:
    """Correct what FastAPI says of answers: a request that is not valid gets 400, and answers can be streams."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in ("/v1/chat/completions", "/v1/completions"):
                operation["responses"]["200"]["content"]["text/event-stream"] = {}
            if path == "/health":
                health = operation["responses"]["200"]["content"]
                operation["responses"]["503"] = {"description": "Ending", "content": health}
    document["components"]["schemas"].pop("HTTPValidationError", None)
    document["components"]["schemas"].pop("ValidationError", None)
