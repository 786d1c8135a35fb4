"""Bodies in, JSON and event streams out, for clients that may leave at any time. Pure ASGI: a middleware of responses would hide that."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kiln.exporter.serve.answer import Answer
from kiln.exporter.serve.fields import Fields, read_json
from kiln.exporter.serve.problem import Problem
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings

T = TypeVar("T")
log = logging.getLogger("kiln.serve")
ASIDE = 64 << 10  # bytes of a body from which on the event loop does not wait for its reading
SLOWEST = 60.0  # seconds in which a client sends one piece of a body, and takes one of a stream


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("utf-8", "replace")


def is_anthropic(scope: Scope) -> bool:
    """Whether the client of a request speaks Anthropic's interface."""
    return scope["path"].removeprefix("/v1").startswith("/messages") or any(name == b"anthropic-version" for name, _ in scope["headers"])


def refused(problem: Problem, scope: Scope) -> Json:
    """A problem as the client of a request reads it."""
    return Json(problem.anthropic() if is_anthropic(scope) else problem.openai(), problem.status, problem.headers)


async def read_body(request: Request, settings: Settings) -> Fields:
    """Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin can send everything else unasked
        raise Problem(415, f"the content type is {kind[:80]!r}, application/json was expected", None, "unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Problem(415, f"the content encoding is {coding[:80]!r}; send the body as it is", None, "unsupported_media_type")
    large = Problem(413, f"the body is larger than {settings.body} bytes", None, "request_too_large", {"connection": "close"})
    if int(request.headers.get("content-length", 0)) > settings.body:  # a number, or the server would not have taken it
        raise large
    raw, pieces = bytearray(), request.stream()
    try:
        while (piece := await asyncio.wait_for(anext(pieces, None), SLOWEST)) is not None:
            raw += piece
            if len(raw) > settings.body:
                raise large
    except ClientDisconnect:
        raise Problem(499, "the client is gone") from None
    except TimeoutError:
        said = f"nothing more of the body came within {SLOWEST:g} seconds"
        raise Problem(408, said, None, "request_timeout", {"connection": "close"}) from None
    if len(raw) < ASIDE:
        return Fields(read_json(raw, settings.depth, settings.brackets))
    return Fields(await asyncio.to_thread(read_json, raw, settings.depth, settings.brackets))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def present(request: Request, answers: Sequence[Answer], work: Coroutine[Any, Any, T]) -> T:
    """The work's result, unless the client leaves before: then its answers are stopped."""
    gone, done = asyncio.ensure_future(_gone(request.receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Problem(499, "the client is gone")
        return done.result()
    finally:
        gone.cancel()
        done.cancel()
        del done  # what failed refers to this frame
        for answer in answers:
            answer.cancel()


def sse(data: Any, event: str | None = None) -> bytes:
    text = data if isinstance(data, str) else dumps(data)
    return ((f"event: {event}\n" if event else "") + f"data: {text}\n\n").encode("utf-8", "replace")


class Stream(Response):
    """Events as they come. ping: sent after so many seconds of silence; failed: how a problem ends the stream."""

    def __init__(
        self,
        served: Served,
        answers: Sequence[Answer],
        events: AsyncIterator[bytes],
        ping: bytes,
        failed: Callable[[Problem], bytes],
    ):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._served, self._answers, self._events, self._ping, self._failed = served, answers, events, ping, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, self._ping)
            await self._pump(send, gone)
        except (TimeoutError, OSError):  # nobody takes it
            pass
        finally:
            gone.cancel()
            for answer in self._answers:
                answer.cancel()

    async def _pump(self, send: Send, gone: asyncio.Future[Any]) -> None:
        events = self._events.__aiter__()
        step: asyncio.Future[bytes | None] = asyncio.ensure_future(_next(events))
        try:
            while True:
                await asyncio.wait([step, gone], timeout=self._served.settings.ping, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not step.done():
                    await self._send(send, self._ping)
                    continue
                if failed := step.exception():  # raised here it would refer to this frame, which refers to it
                    await self._send(send, self._failed(self._told(failed)))
                    break
                piece = step.result()
                if piece is None:
                    break
                await self._send(send, piece)
                step = asyncio.ensure_future(_next(events))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            step.cancel()
            await asyncio.wait([step])
            if not step.cancelled():
                step.exception()  # somebody has seen it

    def _told(self, failed: BaseException) -> Problem:
        if isinstance(failed, Problem):
            self._served.metrics.refused(failed.status)
            return failed
        log.error("a stream failed", exc_info=failed)
        return Problem(500, "internal error")

    async def _send(self, send: Send, piece: bytes) -> None:
        message: Message = {"type": "http.response.body", "body": piece, "more_body": True}
        await asyncio.wait_for(send(message), SLOWEST)


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    """None at the end."""
    return await anext(events, None)


def openai_stream(served: Served, answers: Sequence[Answer], events: AsyncIterator[bytes]) -> Stream:
    return Stream(served, answers, events, b": ping\n\n", lambda problem: sse(problem.openai()) + sse("[DONE]"))


Endpoint = Callable[[Served, Request], Awaitable[Response]]
