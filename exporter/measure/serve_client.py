"""One streamed answer of an OpenAI-compatible server, with the time of each of its parts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from kiln.exporter.errors import KilnError, one_line

if TYPE_CHECKING:
    import aiohttp

BROKEN = "the connection ended before the answer"
LONGEST_LINE = 1 << 20  # bytes of an event


@dataclass
class Answer:
    """Times are seconds of `time.perf_counter`. tokens, prompt and cached are the server's own counts; error: "" where all went well."""

    sent: float
    parts: list[float] = field(default_factory=list)  # when a part with text, a thought or a call came
    end: float = 0.0
    text: str = ""
    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first part."""
        return self.parts[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between parts, as a reader sees them."""
        return [b - a for a, b in zip(self.parts, self.parts[1:], strict=False)]

    @property
    def token_time(self) -> float | None:
        """Seconds a token after the first, also where a part holds several; None of one token."""
        return (self.parts[-1] - self.parts[0]) / (self.tokens - 1) if self.tokens > 1 and len(self.parts) > 1 else None


def base(url: str) -> str:
    """`http://host:port`, with or without /v1, -> where /v1 begins. Raises KilnError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise KilnError(f"{url} is no address of a server; give one like http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path if path.endswith("/v1") else f"{path}/v1", "", ""))


class Client:
    """`async with Client(url, key, timeout) as client`. timeout: seconds of a whole answer."""

    def __init__(self, url: str, key: str = "", timeout: float = 600):
        try:
            import aiohttp
        except ImportError:
            raise KilnError("kiln bench-serve needs aiohttp: pip install 'kiln-export[serve]'") from None
        self._aiohttp, self.base, self._timeout = aiohttp, base(url), timeout
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connector = self._aiohttp.TCPConnector(limit=0)  # as many connections as there are requests under way
        timeout = self._aiohttp.ClientTimeout(total=self._timeout)
        self._session = self._aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers, read_bufsize=LONGEST_LINE)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def model(self) -> str:
        """The first model of the server. Raises KilnError."""
        assert self._session
        try:
            async with self._session.get(f"{self.base}/models") as response:
                if response.status != 200:
                    raise KilnError(f"{self.base}/models: {_said(response.status, await response.text())}")
                return str((await response.json(content_type=None))["data"][0]["id"])
        except (TimeoutError, self._aiohttp.ClientError, OSError) as e:
            raise KilnError(f"{self.base}: cannot be reached: {one_line(e)}") from e
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise KilnError(f"{self.base}/models: is no list of models; name one with --model") from e

    async def answer(self, request: dict[str, Any]) -> Answer:
        """Streams one answer to its end. What goes wrong is told in it."""
        assert self._session
        body = request | {"stream": True, "stream_options": {"include_usage": True}}
        answer = Answer(time.perf_counter())
        try:
            async with self._session.post(f"{self.base}/chat/completions", json=body) as response:
                if response.status != 200:
                    answer.error = _said(response.status, await response.text())
                else:
                    await self._read(response, answer)
        except TimeoutError:
            answer.error = f"no end within {self._timeout:g} s"
        except (self._aiohttp.ClientPayloadError, self._aiohttp.ServerDisconnectedError):
            answer.error = BROKEN
        except (self._aiohttp.ClientError, OSError, ValueError) as e:
            answer.error = one_line(f"{type(e).__name__}: {e}", 120)
        answer.end = time.perf_counter()
        return answer

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        done, texts = False, []
        async for raw in response.content:
            now = time.perf_counter()
            line = raw.strip()
            if not line.startswith(b"data:"):
                continue  # an empty line, or a comment that keeps the connection open
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                break
            event = json.loads(data)
            if event.get("error"):
                error = event["error"]
                answer.error = one_line(error.get("message", error) if isinstance(error, dict) else error, 120)
                return
            if usage := event.get("usage"):
                answer.tokens, answer.prompt = int(usage.get("completion_tokens") or 0), int(usage.get("prompt_tokens") or 0)
                answer.cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            for choice in event.get("choices") or ():
                done = done or choice.get("finish_reason") is not None
                delta = choice.get("delta") or {}
                if delta.get("content"):
                    texts.append(delta["content"])
                if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
                    answer.parts.append(now)
        answer.text = "".join(texts)
        if not done:
            answer.error = BROKEN
        elif not answer.parts:
            answer.error = "an answer without text"


def _said(status: int, body: str) -> str:
    """The server's own words, on one line."""
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = body
    return one_line(f"{status}: {message}", 120)
