"""Clients that leave at every stage, a queue that is full, answers that take too long, and the end of a server: nothing stays behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kiln.exporter.serve.served import Served
from kiln.exporter.serve.settings import Settings
from tests.conftest import WAIT
from tests.serve.conftest import QUEUE, SESSIONS, Running, Script, running

LONG = {"prompt": [2, 40, 41], "max_tokens": 90, "ignore_eos": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def begun(url: str, path: str, body: dict, until: bytes = b"\r\n\r\n") -> socket.socket:
    """A request whose answer has begun, as far as `until`."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    client = socket.create_connection((host, int(port)), WAIT)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-key-of-the-tests\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    seen = b""
    while until and until not in seen:
        piece = client.recv(4096)
        assert piece, seen
        seen += piece
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_is_written(script: Script, stream: bool) -> None:
    body = {"model": "gemma", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    script.will_say("one two three four five")
    script.engine.gate.clear()
    client = begun(script.url, "/v1/chat/completions", body, b"ping" if stream else b"")
    while not (script.engine.jobs and script.engine.jobs[-1].started and not script.engine.jobs[-1].over):
        time.sleep(0.005)
    job = script.engine.jobs[-1]
    assert not job.cancelled
    client.close()
    try:
        assert script.idle() and job.cancelled
    finally:
        script.engine.gate.set()


def test_before_it_begins_and_after(real: Running) -> None:
    """Half a request, a request that nobody waits for, and one whose reader stops: the sessions are free again, and answer."""
    for cut in (20, 150, None):
        raw = json.dumps(LONG | {"stream": True}).encode()
        whole = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
            + raw
        )
        with socket.create_connection(real.url.removeprefix("http://").rsplit(":", 1), WAIT) as client:  # type: ignore[arg-type]
            client.sendall(whole[:cut])
    for until in (b"", b"ping", b"text"):
        begun(real.url, "/v1/completions", LONG | {"stream": True}, until).close()
        begun(real.url, "/v1/completions", LONG, b"").close()
    assert real.idle()
    found = httpx.post(f"{real.url}/v1/completions", json=LONG | {"max_tokens": 3}, timeout=WAIT).json()
    assert found["usage"]["completion_tokens"] == 3


def test_a_cancelled_request_leaves_the_others(real: Running) -> None:
    """Of several that are written beside each other one is left: the others' texts are those of requests alone."""
    bodies = [LONG | {"seed": seed, "max_tokens": 60} for seed in range(SESSIONS)]
    alone = [httpx.post(f"{real.url}/v1/completions", json=body, timeout=WAIT).json()["choices"][0]["text"] for body in bodies]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = httpx.post(f"{real.url}/v1/completions", json=bodies[i], timeout=WAIT).json()["choices"][0]["text"]

    left = begun(real.url, "/v1/completions", LONG | {"stream": True}, b"text")
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(SESSIONS)]
    for thread in threads:
        thread.start()
    left.close()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(SESSIONS)] == alone


def test_overload(real: Running) -> None:
    """More than may wait: 429 with Retry-After for those beyond, and every one that was taken is answered."""
    found: list[httpx.Response] = []

    def ask(seed: int) -> None:
        found.append(httpx.post(f"{real.url}/v1/completions", json=LONG | {"seed": seed}, timeout=WAIT))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4 * (SESSIONS + QUEUE))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [r for r in found if r.status_code == 200]
    refused = [r for r in found if r.status_code == 429]
    assert len(taken) >= SESSIONS + QUEUE and len(taken) + len(refused) == len(threads)
    assert all(r.json()["usage"]["completion_tokens"] == 90 for r in taken)
    assert all(r.headers["retry-after"] and r.json()["error"]["code"] == "queue_full" for r in refused)
    assert httpx.post(f"{real.url}/v1/completions", json=LONG | {"n": SESSIONS + QUEUE}, timeout=WAIT).status_code == 200
    more = httpx.post(f"{real.url}/v1/completions", json=LONG | {"n": SESSIONS + QUEUE + 1}, timeout=WAIT)
    assert more.status_code == 429 and more.json()["error"]["param"] == "n" and more.headers["x-should-retry"] == "false"
    assert "retry-after" not in more.headers  # trying again would not help
    assert real.idle()


@pytest.fixture(scope="module")
def hurried(talking: Path, settings: Settings) -> Iterator[Running]:
    """Answers may take a twentieth of a second."""
    with running(Served.load(talking, "cpu", 1, dataclasses.replace(settings, sessions=1, timeout=0.05))) as found:
        yield found


def test_deadlines(hurried: Running) -> None:
    body = LONG | {"logit_bias": {"9": 1}, "n": 6}  # chosen on the host, so slow enough
    found = httpx.post(f"{hurried.url}/v1/completions", json=body, timeout=WAIT)
    assert found.status_code == 504 and found.json()["error"]["code"] == "timeout" and found.headers["x-should-retry"] == "false"
    streamed = httpx.post(f"{hurried.url}/v1/completions", json=body | {"stream": True}, timeout=WAIT).text
    assert '"code":"timeout"' in streamed and streamed.endswith("data: [DONE]\n\n")
    assert hurried.idle()


@pytest.mark.flaky(reruns=2)  # a drain of a second and a half, on a machine that does other things
def test_the_end_of_a_server(talking: Path) -> None:
    """SIGTERM: no new request is taken, a stream that lasts too long gets an error event and its end, exit code 0."""
    command = [sys.executable, "-m", "exporter", "serve", talking, "--port", "0", "--device", "cpu", "--threads", "1", "--drain", "1.5"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        said = process.stdout.readline()
        url = re.findall(r"http://\S+", said)[0]
        assert httpx.get(f"{url}/health", timeout=WAIT).json() == {"status": "ok"}
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}, timeout=WAIT).status_code == 403
        body = LONG | {"stream": True, "n": 60, "logit_bias": {"9": 1}, "model": talking.name}
        client = begun(url, "/v1/completions", body, b"text")
        os.kill(process.pid, signal.SIGTERM)
        seen, during = b"", set[int]()
        time.sleep(0.1)
        for path in ("/health", "/health/live"):
            during.add(httpx.get(url + path, timeout=WAIT).status_code)
        refused = httpx.post(f"{url}/v1/completions", json=LONG, timeout=WAIT)
        assert during == {503, 200} and refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        while piece := client.recv(1 << 16):
            seen += piece
        assert b'"code":"shutting_down"' in seen and b"data: [DONE]" in seen and seen.endswith(b"0\r\n\r\n")
        assert process.wait(WAIT) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


# print sends the process SIGTERM once it has written its first line
SIGNALLED = """
import builtins, os, signal, sys
from kiln.exporter.cli import main
written = builtins.print
def print(*words, **options):
    written(*words, **options)
    builtins.print = written
    os.kill(os.getpid(), signal.SIGTERM)
builtins.print = print
sys.argv = ["kiln", *sys.argv[1:]]
main()
"""


def test_a_signal_at_the_first_line(talking: Path) -> None:
    """Who has read where it serves may end it: the line comes when signals are the server's."""
    command = [sys.executable, "-c", SIGNALLED, "serve", talking, "--port", "0", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"serving {talking.name} at http://127.0.0.1:")
