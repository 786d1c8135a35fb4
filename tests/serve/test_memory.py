"""What requests leave in memory: nothing that waits for the collector of circles, and no heap for each thread."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings
from tests.conftest import WAIT
from tests.serve.conftest import KEY, Running, Script, running
from tests.serve.test_gone import LONG, begun

TIMES = 4  # requests of a kind: all but the last are certainly over when what is left is counted


def of_this_project(thing: object) -> bool:
    for code in ("f_code", "cr_code", "ag_code", "gi_code", "__code__"):
        if isinstance(found := getattr(thing, code, None), types.CodeType):
            return "/exporter/" in found.co_filename
    return type(thing).__module__.startswith("kiln.")


@contextlib.contextmanager
def uncollected() -> Iterator[Counter[str]]:
    """By type, what of this project within the block became garbage that only the collector frees."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # a server of an earlier test may be let go meanwhile, by a thread of its own that ends late
    gc.disable()
    try:
        yield found
        time.sleep(0.05)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(thing).__name__ for thing in gc.garbage if of_this_project(thing))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
        gc.collect()


def test_what_counts_as_uncollected() -> None:
    with uncollected() as found:
        settings = Settings()
        object.__setattr__(settings, "itself", settings)
        del settings
    assert found == {"Settings": 1}


def plain(**fields: Any) -> Callable[[str], None]:
    def ask(url: str) -> None:
        assert httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 5} | fields, timeout=WAIT).status_code == 200

    return ask


def left(**fields: Any) -> Callable[[str], None]:
    return lambda url: begun(url, "/v1/completions", LONG | fields, b"text" if fields else b"").close()


def wrong(url: str) -> None:
    assert httpx.post(f"{url}/v1/completions", json={"prompt": [2] * 100}, timeout=WAIT).status_code == 400


def refused(url: str) -> None:
    assert httpx.post(f"{url}/v1/completions", json=LONG | {"n": 100}, timeout=WAIT).status_code == 429


@pytest.mark.parametrize(
    "ask",
    [
        plain(), plain(stream=True), plain(n=2), plain(logprobs=2), plain(logprobs=2, echo=True, n=2), plain(repetition_penalty=1.2),
        plain(min_tokens=3), plain(stop=["a", "e"]), left(), left(stream=True), wrong, refused,
    ],
    ids="plain stream n logprobs echo penalty least stop left left-stream wrong refused".split(),
)  # fmt: skip
def test_completions(real: Running, ask: Callable[[str], None]) -> None:
    ask(real.url)
    assert real.idle()
    with uncollected() as found:
        for _ in range(TIMES):
            ask(real.url)
        assert real.idle()
    assert not found


@pytest.mark.parametrize("stream", [True, False])
def test_too_late(talking: Path, settings: Settings, stream: bool) -> None:
    """What an engine says instead of an answer."""
    hurried = dataclasses.replace(settings, sessions=1, timeout=0.05)
    with running(Served.load(talking, "cpu", 1, hurried)) as server, uncollected() as found:
        for _ in range(TIMES):
            body = LONG | {"logit_bias": {"9": 1}, "n": 6, "stream": stream}  # chosen on the host, so slow enough
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT)
            assert '"code":"timeout"' in response.text
        assert server.idle()
    assert not found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
def test_conversations(script: Script, path: str, stream: bool) -> None:
    """With a thought that has a budget, a tool, and two choices where there may be as many."""
    said: Any = [{"role": "user", "content": "x"}]
    tool: dict[str, Any] = {"name": "f", "description": "", "parameters": {"type": "object"}}
    body: dict[str, Any] = {"model": "gemma", "stream": stream, "max_tokens": 9}
    if path == "chat/completions":
        body |= {"messages": said, "n": 2, "tools": [{"type": "function", "function": tool}], "reasoning_effort": "low"}
    elif path == "messages":
        schema = {"name": "f", "description": "", "input_schema": {"type": "object"}}
        body |= {"messages": said, "tools": [schema]}
    else:
        body = {"model": "gemma", "stream": stream, "max_output_tokens": 9, "input": "x", "tools": [{"type": "function", **tool}]}

    def ask() -> None:
        for _ in range(body.get("n", 1)):
            script.will_say("one two three")
        response = httpx.post(f"{script.url}/v1/{path}", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=WAIT)
        assert response.status_code == 200 and ("three" in response.text), response.text

    ask()
    with uncollected() as found:
        for _ in range(TIMES):
            ask()
        script.engine.jobs.clear()
    assert not found


# kiln serve, which writes down the heaps of the C library when it is told to.
COUNTING = """
import ctypes, signal, sys
def count(*_):
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
signal.signal(signal.SIGUSR1, count)
from kiln.exporter.cli import main
main(["serve", *sys.argv[2:]])
"""


def test_threads_share_heaps(talking: Path, tmp_path: Path) -> None:
    """The engine's thread and those that read prompts have none of their own, whose free end glibc would keep."""
    told = tmp_path / "heaps.xml"
    command = [sys.executable, "-c", COUNTING, str(told), str(talking), "--port", "0", "--device", "cpu", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            url = re.findall(r"http://\S+", process.stdout.readline())[0]
            some = [threading.Thread(target=plain(model=talking.name), args=(url,)) for _ in range(6)]
            for thread in some:
                thread.start()
            for thread in some:
                thread.join()
            process.send_signal(signal.SIGUSR1)
            end = time.monotonic() + WAIT
            while not (told.exists() and "</malloc>" in told.read_text()):
                assert time.monotonic() < end
                httpx.get(f"{url}/health", timeout=WAIT)  # the handler runs in the thread that answers
                time.sleep(0.02)
        finally:
            process.terminate()
    assert 1 <= len(re.findall(r"<heap nr=", told.read_text())) <= 2
