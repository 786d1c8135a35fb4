"""`kiln serve`: loads, listens, and ends without cutting anybody off who can be answered in time."""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import logging
import os
import socket
import stat
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from kiln.exporter.errors import KilnError
from kiln.exporter.serve.app import application
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings

FLUSH = 5  # seconds in which ended streams reach their clients
LEAST_KEY = 8  # characters
M_ARENA_MAX, ARENAS = -8, 2  # of malloc.h


def read_keys(path: Path) -> tuple[bytes, ...]:
    """One key a line; empty lines and lines that begin with # are none. Raises KilnError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise KilnError(f"{path}: cannot read the API keys: {e}") from e
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise KilnError(f"{path} holds no API key; write one a line")
    for i, line in enumerate(lines, 1):
        if line in keys and (len(line) < LEAST_KEY or not line.isascii() or " " in line):
            raise KilnError(f"{path}:{i}: an API key has {LEAST_KEY} ASCII characters at least and no space")
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"note: {path} can be read by others; chmod 600 {path}", file=sys.stderr)
    return tuple(key.encode() for key in keys)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Raises KilnError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except (OSError, OverflowError) as e:
        raise KilnError(f"cannot listen on {host}:{port}: {e}; give another --host or --port") from e
    return bound


class Server(uvicorn.Server):
    """The first signal lets answers end, the second ends them."""

    def __init__(self, config: uvicorn.Config, served: Served, address: str):
        super().__init__(config)
        self._served, self._address, self._ending = served, address, False
        self._drained: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it serves only now: requests are answered and a signal lets answers end."""
        await super().startup(sockets=sockets)
        if self.started:
            line = f"serving {self._served.settings.names[0]} at {self._address}"
            try:
                print(line, flush=True)
            except OSError as e:  # of a server whose output nobody wants
                print(f"note: standard output takes nothing: {e.strerror}; {line}", file=sys.stderr)
                sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending:
            self._served.settings = _hurried(self._served.settings)
            return
        self._ending = self._served.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._drained = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        start = time.monotonic()
        while any(self._served.engine.load()[:2]) and time.monotonic() - start < self._served.settings.drain:
            await asyncio.sleep(0.05)
        await asyncio.get_running_loop().run_in_executor(None, self._served.engine.close)
        self.should_exit = True


def _hurried(settings: Settings) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, drain=0.0)


def config(app: ASGIApp) -> uvicorn.Config:
    """Of uvicorn: no line for each request, no names of what runs here in headers."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=True, timeout_graceful_shutdown=FLUSH, lifespan="on",
        ws="none", proxy_headers=False, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip


def few_arenas() -> None:
    """Lets all threads share two heaps of the C library, before there are any.

    Each would have its own, which keeps up to 64 MiB at its end for that thread alone once it has parsed large bodies.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def serve(
    artifact: Path, host: str, port: int, device: str, threads: int | None, settings: Settings, weights: Path | None = None
) -> None:
    """Until a signal. Raises KilnError where it cannot begin."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    few_arenas()
    bound = listen(host, port)
    if not loopback(host) and not settings.keys:
        print(f"note: everybody who reaches {host} may use the model; --api-keys FILE asks for keys", file=sys.stderr)
    try:
        served = Served.load(artifact, device, threads, settings, weights)
    except BaseException:
        bound.close()
        raise
    address = bound.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        server = Server(config(application(served)), served, f"http://{shown}:{address[1]}")
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        served.close()
