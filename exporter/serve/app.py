"""The ASGI application: routes, and the gate before them."""

from __future__ import annotations

import contextlib
import hmac
import logging
import mimetypes
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as Http
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiln.exporter.errors import printable
from kiln.exporter.serve.api.chat import chat
from kiln.exporter.serve.api.completions import completions, detokenize, tokenize
from kiln.exporter.serve.api.messages import count_tokens, messages
from kiln.exporter.serve.api.responses import responses
from kiln.exporter.serve.problem import Problem
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.web import Endpoint, Json, is_anthropic, refused

log = logging.getLogger("kiln.serve")
PAGE = Path(__file__).with_name("page")
OPEN = {"/health", "/health/live"}  # without a key
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Gate:
    """Pure ASGI: the Host header where the server listens on loopback alone, keys, and a line for each request where it is asked for."""

    def __init__(self, app: ASGIApp, served: Served, page: frozenset[str]):
        self.app, self.served, self.page = app, served, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["path"] = scope["path"].rstrip("/") or "/"
        start, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    self.served.metrics.refused(status)
            await send(message)

        try:
            self._check(scope)
        except Problem as problem:
            await refused(problem, scope)(scope, receive, noting)
        else:
            await self.app(scope, receive, noting)
        if self.served.settings.log:
            log.info("%s %s %s %.3f s", scope["method"], printable(scope["path"]), status, time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"authorization", b"x-api-key")}
        settings, path = self.served.settings, scope["path"]
        if settings.hosts is not None:
            name = _host(headers.get(b"host", b"").decode("latin-1"))
            if name not in settings.hosts:
                said = f"the host {name[:80]!r} is none of {', '.join(settings.hosts)}; see --allow-host"
                raise Problem(403, said, None, "host_not_allowed")
        if settings.keys and path not in OPEN and not (scope["method"] in ("GET", "HEAD") and path in self.page):
            given = headers.get(b"authorization", b"")
            given = given[7:].strip() if given[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
            if not sum([hmac.compare_digest(given, key) for key in settings.keys]):  # all of them, whichever fits
                raise Problem(401, "the API key is missing or wrong", None, "invalid_api_key", {"www-authenticate": "Bearer"})


def _host(value: str) -> str:
    """A Host header without its port."""
    if value.startswith("["):
        return value.partition("]")[0][1:].lower()
    return value.partition(":")[0].lower()


async def health(served: Served, http: Http) -> Response:
    if served.draining:
        raise Problem(503, "the server is shutting down", None, "shutting_down")
    if served.engine.broken:
        raise Problem(503, f"the model cannot be used any more: {served.engine.broken}", None, "broken")
    return Json({"status": "ok"})


async def live(served: Served, http: Http) -> Response:
    return Json({"status": "ok"})


async def metrics(served: Served, http: Http) -> Response:
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")


def model_record(served: Served, name: str, anthropic: bool) -> dict[str, Any]:
    if anthropic:
        created = datetime.fromtimestamp(served.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"type": "model", "id": name, "display_name": name, "created_at": created}
    return {"id": name, "object": "model", "created": served.created, "owned_by": "kiln", "max_model_len": served.max_seq_len}


async def models(served: Served, http: Http) -> Response:
    names, anthropic = served.settings.names, is_anthropic(http.scope)
    data = [model_record(served, name, anthropic) for name in names]
    return Json(
        {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]} if anthropic else {"object": "list", "data": data}
    )


async def one_model(served: Served, http: Http) -> Response:
    return Json(model_record(served, served.model(http.path_params["name"]), is_anthropic(http.scope)))


async def version(served: Served, http: Http) -> Response:
    import kiln

    return Json({"version": kiln.__version__})


GETS: dict[str, Endpoint] = {
    "/health": health,
    "/health/live": live,
    "/metrics": metrics,
    "/version": version,
    "/models": models,
    "/models/{name:path}": one_model,
}
POSTS: dict[str, Endpoint] = {
    "/chat/completions": chat,
    "/completions": completions,
    "/responses": responses,
    "/messages": messages,
    "/messages/count_tokens": count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}


def page_files(folder: Path) -> dict[str, Path]:
    """Address -> file of the static page; nothing else is served from there."""
    found = {f"/{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*")) if p.is_file()} if folder.is_dir() else {}
    return found | ({"/": found["/index.html"]} if "/index.html" in found else {})


def application(served: Served, folder: Path = PAGE) -> Starlette:
    page = page_files(folder)

    def bound(endpoint: Endpoint) -> Any:
        async def call(http: Http) -> Response:
            try:
                return await endpoint(served, http)
            except (Problem, HTTPException):
                raise
            except Exception as e:  # further out it would end the connection, and other origins could not read it
                log.error("a request failed", exc_info=e)
                raise Problem(500, "internal error") from None

        return call

    async def static(http: Http) -> Response:
        path = http.scope["path"]
        bare, file = path.removeprefix("/v1"), page.get(path)
        get = file is not None or path == "/" or bare in GETS or bare.startswith("/models/")
        if not get and bare not in POSTS:
            raise HTTPException(404)
        if not get or http.method not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"allow": "GET, HEAD" if get else "POST"})
        if file is None:
            return PlainTextResponse("Kiln serves a model here: POST /v1/chat/completions, GET /v1/models\n")
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
        return FileResponse(file, headers=headers, media_type=mimetypes.guess_type(file.name)[0] or "application/octet-stream")

    routes = []
    for prefix in ("/v1", ""):
        routes += [Route(prefix + path, bound(endpoint), methods=["GET"]) for path, endpoint in GETS.items()]
        routes += [Route(prefix + path, bound(endpoint), methods=["POST"]) for path, endpoint in POSTS.items()]
    routes.append(Route("/{path:path}", static, methods=METHODS))

    async def told(http: Http, error: Exception) -> Response:
        if isinstance(error, Problem):
            return refused(error, http.scope)
        if isinstance(error, HTTPException):
            said = {404: "there is nothing at this address", 405: "this address takes another method"}.get(error.status_code, error.detail)
            return refused(Problem(error.status_code, said, None, None, error.headers), http.scope)
        log.error("a request failed", exc_info=error)
        return refused(Problem(500, "internal error"), http.scope)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield

    middleware = []
    if served.settings.origins:
        origins = list(served.settings.origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], max_age=600))
    middleware.append(Middleware(Gate, served=served, page=frozenset({"/", *page})))
    handlers: dict[Any, Any] = {Problem: told, HTTPException: told, Exception: told}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
