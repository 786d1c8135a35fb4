"""Test helper: a server of OpenAI's surface without a model. It answers by a script, at known times, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"


@dataclass
class Answer:
    """What is streamed: deltas, or texts that are content, `gap` seconds apart, the first after `first` seconds.

    status: an error instead, with `error` as its message. cut: the connection is closed after the last delta. late_error: an error event
    there. prompt_tokens: None counts four characters of the messages a token, at most `cached` of which are told as cached. tokens: of the
    answer; None: one a part.
    """

    parts: Sequence[str | dict[str, Any]] = ()
    first: float = 0.0
    gap: float = 0.0
    finish: str = "stop"
    status: int = 200
    error: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    late_error: str = ""
    usage: bool = True
    prompt_tokens: int | None = None
    cached: int = 0
    tokens: int | None = None
    raw: bytes | None = None  # the stream's bytes as they are, after its header


class FakeServer:
    """`with FakeServer(page=folder) as server`: listens on 127.0.0.1 in a thread of its own. `answer(request)` makes the answer."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], page: Path | None = None, context: int | None = 4096, key: str = "",
                 name: str = "fake-model"):  # fmt: skip
        self.answer, self.page, self.context, self.key, self.name = answer, page, context, key, name
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.times: list[float] = []  # when each question came, by time.perf_counter
        self.cancelled = 0  # answers whose reader went away
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeServer:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self._stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while entry := (await reader.readline()).decode().strip():
                    name, _, value = entry.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.paths.append(path)
                if not await self._respond(method, path.partition("?")[0], headers, body, reader, writer):
                    break
        writer.close()

    async def _respond(
        self, method: str, path: str, headers: dict[str, str], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection may be used again."""
        if path.startswith("/v1/") and self.key and headers.get("authorization") != f"Bearer {self.key}":
            return self._send(writer, 401, _error("a key is needed", "invalid_api_key"))
        if path == "/v1/models":
            limit = {"max_model_len": self.context} if self.context else {}
            return self._send(writer, 200, {"object": "list", "data": [{"id": self.name, "object": "model", **limit}]})
        if path == "/v1/chat/completions" and method == "POST":
            request = json.loads(body)
            self.requests.append(request)
            self.times.append(time.perf_counter())
            answer = self.answer(request)
            if answer.status != 200:
                await asyncio.sleep(answer.first)
                return self._send(writer, answer.status, _error(answer.error, "server_error"), answer.headers)
            return await self._stream(request, answer, reader, writer)
        file = self.page / (path.lstrip("/") or "index.html") if self.page else None
        if file and file.is_file() and file.parent == self.page:
            return self._send(writer, 200, file.read_bytes(), {"Content-Type": TYPES[file.suffix], "Content-Security-Policy": POLICY})
        return self._send(writer, 404, _error(f"nothing at {path}", "not_found"))

    def _send(self, writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None) -> bool:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(data))}
        writer.write(f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n" + data)
        return True

    async def _stream(self, request: dict[str, Any], answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        gone = asyncio.ensure_future(reader.read(1))  # nothing more is sent, so this ends when the reader leaves
        try:
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            loop = asyncio.get_running_loop()
            begin = loop.time()
            if answer.raw is not None:
                _chunk(writer, answer.raw)
            else:
                _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for i, part in enumerate(answer.parts):
                wait = begin + answer.first + i * answer.gap - loop.time()  # on a grid: sleeping late once delays nothing after it
                if (await asyncio.wait({gone}, timeout=max(wait, 0)))[0]:
                    self.cancelled += 1
                    return False
                delta = {"content": part} if isinstance(part, str) else part
                _event(writer, {"choices": [{"index": 0, "delta": delta}]})
                await writer.drain()
            if answer.cut:
                await asyncio.sleep(0.1)  # a reader drops what it has not taken yet when a connection breaks
            if answer.late_error:
                _event(writer, _error(answer.late_error, "server_error"))
            elif not answer.cut and answer.raw is None:
                _event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish}]})
                if answer.usage and (request.get("stream_options") or {}).get("include_usage"):
                    prompt = answer.prompt_tokens or sum(len(m["content"]) for m in request["messages"]) // 4
                    tokens = len(answer.parts) if answer.tokens is None else answer.tokens
                    usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
                    usage |= {"prompt_tokens_details": {"cached_tokens": min(answer.cached, prompt)}}
                    _event(writer, {"choices": [], "usage": usage})
            if not answer.cut:
                _chunk(writer, b"data: [DONE]\n\n")
                writer.write(b"0\r\n\r\n")
            await writer.drain()
            return False
        except ConnectionError:
            self.cancelled += 1
            raise
        finally:
            self.at_once -= 1
            gone.cancel()


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _event(writer: asyncio.StreamWriter, record: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(record).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
