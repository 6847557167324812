"""The web application: pages, and the requests they make."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.staticfiles import StaticFiles

from rookery import __version__
from rookery.errors import UserError
from rookery.i18n import catalogue
from rookery.ui import actions, failures, form, machine
from rookery.ui.console import Console
from rookery.ui.events import Changes, stream
from rookery.ui.places import KINDS, OutsideError
from rookery.ui.security import Guard

Values = Annotated[dict[str, Any], Body()]
"""The fields of a form, as a page sends them."""

STATIC = Path(str(resources.files("rookery").joinpath("ui", "static")))


def create_app(console: Console, *, ended: Callable[[], bool] = lambda: False) -> Guard:
    """The application, behind its guard.

    Args:
        console: what it shows.
        ended: whether the server is about to stop, so that open streams end too.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        console.close()

    app = FastAPI(title="Rookery", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    page = (STATIC / "index.html").read_text(encoding="utf-8")

    @app.exception_handler(UserError)
    async def refuse(_request: Request, error: UserError) -> JSONResponse:
        failure = failures.find(str(error))
        told = None if failure is failures.UNKNOWN else failures.as_dict(failure)
        status = 403 if isinstance(error, OutsideError) else 400
        return JSONResponse({"error": str(error), "failure": told}, status_code=status)

    @app.exception_handler(RequestValidationError)
    async def misunderstand(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(
            {"error": "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())}, 422
        )

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return page.replace('data-theme="auto"', f'data-theme="{console.settings.theme}"')

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _settings_routes(app, console)
    _train_routes(app, console)
    _run_routes(app, console, ended)
    _file_routes(app, console)
    _server_routes(app, console)
    return Guard(app, host=console.host, token=console.token, script_hash=script_hash(page))


def script_hash(page: str) -> str:
    """What the content policy calls the page's inline script, its import map."""
    script = re.search(r'<script type="importmap">(.*?)</script>', page, re.DOTALL)
    assert script, "index.html has an import map"
    return "sha256-" + base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()


def _settings_routes(app: FastAPI, console: Console) -> None:
    @app.get("/api/hello")
    def hello() -> dict[str, Any]:
        return {
            "version": __version__,
            "settings": console.preferences(),
            "form": form.schema(),
            "machine": machine.machine(),
        }

    @app.get("/api/catalogue")
    def sentences() -> dict[str, str]:
        return catalogue()

    @app.post("/api/settings")
    def prefer(values: Values) -> dict[str, Any]:
        return console.prefer(values)


def _train_routes(app: FastAPI, console: Console) -> None:
    @app.post("/api/train/check")
    def check(values: Values) -> dict[str, Any]:
        return console.check(values)

    @app.post("/api/train/start")
    def start(values: Values) -> dict[str, str]:
        return {"run": console.train(values)}

    @app.post("/api/train/toml", response_class=PlainTextResponse)
    def recipe(values: Values) -> str:
        return form.toml(form.read(values, console.places))

    @app.post("/api/train/read")
    def read(text: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        values = form.read_recipe(text)
        return {"values": values, "method": form.method_of(values)}


def _run_routes(app: FastAPI, console: Console, ended: Callable[[], bool]) -> None:
    @app.get("/api/events")
    async def events(run: str = "", count: int = 0, generation: int = 0) -> StreamingResponse:
        try:
            watched = console.runs.get(run) if run else None
        except UserError:  # it was deleted; the rest of the console goes on
            watched = None
        changes = Changes(console, watched, count, generation)
        return StreamingResponse(stream(changes, ended), media_type="text/event-stream")

    @app.get("/api/runs/metrics")
    def metrics(
        run: str,
        first: float | None = None,
        last: float | None = None,
        points: Annotated[int, Query(ge=10, le=20000)] = 2000,
    ) -> dict[str, Any]:
        found = console.runs.get(run).metrics
        found.refresh()
        return found.series(float("-inf") if first is None else first, float("inf") if last is None else last, points)

    @app.get("/api/runs/config")
    def config(run: str) -> dict[str, Any]:
        found = console.runs.get(run)
        values = {leaf: form.as_text(value) for leaf, value in found.config().items()}
        asked = {leaf: form.as_text(value) for leaf, value in found.request().items()}
        return {"values": values, "asked": asked, "method": form.method_of(values)}

    @app.get("/api/runs/contents")
    def contents(run: str) -> list[dict[str, Any]]:
        return console.runs.get(run).contents()

    @app.get("/api/runs/log", response_class=PlainTextResponse)
    def log(run: str) -> str:
        return console.runs.get(run).log_end()

    @app.post("/api/runs/stop")
    def stop(run: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        console.stop(run)
        return {}

    @app.post("/api/runs/resume")
    def resume(run: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        console.resume(run)
        return {}

    @app.post("/api/runs/delete")
    def delete(run: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        console.runs.delete(run)
        return {}


def _file_routes(app: FastAPI, console: Console) -> None:
    @app.get("/api/files")
    def files(path: str = "", kind: str = "any") -> dict[str, Any]:
        return console.places.listing(path, kind if kind in KINDS else "any")

    @app.get("/api/models")
    def models() -> list[dict[str, Any]]:
        return console.models()

    @app.get("/api/data/preview")
    def preview(
        path: str, format: str = "auto", mask: str = "auto", template: str = "world", ctx_len: str = "1024"
    ) -> dict[str, Any]:
        options = {"data_format": format, "loss_mask": mask, "template": template, "ctx_len": ctx_len}
        return actions.preview(console, path, options)

    @app.post("/api/data/make")
    def make(values: Values) -> dict[str, Any]:
        return actions.make(console, values)

    @app.post("/api/models/merge")
    def merge(values: Values) -> dict[str, Any]:
        return actions.merge(console, values)

    @app.post("/api/models/convert")
    def convert(values: Values) -> dict[str, Any]:
        return actions.convert(console, values)

    @app.post("/api/jobs/cancel")
    def cancel(id: Annotated[int, Body(embed=True)]) -> dict[str, Any]:
        return console.jobs.cancel(id)


def _server_routes(app: FastAPI, console: Console) -> None:
    @app.post("/api/servers/start")
    def start(values: Values) -> dict[str, Any]:
        return actions.serve(console, values)

    @app.get("/api/servers/state")
    def state(id: int) -> dict[str, Any]:
        return console.servers.state(id)

    @app.post("/api/servers/stop")
    def stop(id: Annotated[int, Body(embed=True)]) -> dict[str, Any]:
        return console.servers.stop(id)

    @app.post("/api/chat")
    def chat(id: Annotated[int, Body()], body: Values) -> StreamingResponse:
        status, parts = console.servers.chat(id, actions.chat_request(console, body))
        kind = "text/event-stream" if body.get("stream") else "application/json"
        return StreamingResponse(parts, status_code=status, media_type=kind)
