"""Random clients against a server: python -m tests.tools.soak_serve ARTIFACT --minutes 120 [--clients 8] [--sessions 2] [--salted]

Each asks, streams, reads slowly, leaves at some stage, sends what is wrong or too long, or goes on where an earlier answer ended. Every
answer that is completed must be, token for token, that of a session which has the model for itself; but for conversations, where the
artifact has a template: they go on from snapshots, and bits depend on where pieces of prompts ended. At the end nothing may be in work, and
the server may have no more in memory than 5 % above what it had after the first fifth of the time, its warm-up. Snapshots of prompts stay
within their budget at every moment that is looked at, five times a second.

What counts is the resident memory once the allocator has given free pages back: what is in use. Without that the figure follows the most
that requests ever held at once, of bodies of 50,000 ids above all, which grows for as long as chance brings more of them together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

import kiln

PATIENCE = 600  # seconds: on a machine whose cores others fill, an answer may take minutes

WRONG: list[dict[str, Any]] = [
    {"prompt": 3},
    {"prompt": []},
    {"prompt": "x", "n": 0},
    {"prompt": [1 << 40]},
    {"prompt": "x", "top_p": 2},
    {},
]


class Client(threading.Thread):
    """One client. `found` counts what it did; what must not be raises.

    salted: no prompt goes on where another ended. Needed where bits depend on where pieces ended, which a session alone does not share.
    """

    def __init__(
        self, url: str, model: kiln.Model, chunk: int, seed: int, end: float, pause: float = 0.0, salted: bool = False, talks: bool = False
    ):
        super().__init__(daemon=True)
        self.talks, self.said = talks, list[dict[str, str]]()
        self.url, self.model, self.random, self.end, self.pause = url, model, Random(seed), end, pause
        self.solo, self.salted = kiln.Session(model, prefill_chunk=chunk), salted
        self.found: Counter[str] = Counter()
        self.failed: BaseException | None = None
        self.last: list[int] = []
        self.most = model.max_seq_len

    def run(self) -> None:
        kinds: list[Callable[[], None]] = [self.ask, self.ask, self.stream, self.stream, self.leave, self.leave, self.wrong, self.huge]
        kinds += [self.talk] * 2 * self.talks
        try:
            with httpx.Client(base_url=self.url, timeout=PATIENCE) as self.http:
                while time.monotonic() < self.end:
                    self.random.choice(kinds)()
                    time.sleep(self.random.random() * self.pause)
        except BaseException as e:
            self.failed = e

    def body(self) -> dict[str, Any]:
        """Some go on where the last answer ended, which the caches may hold."""
        random = self.random
        ids = [*self.last, *(random.randrange(20, 500) for _ in range(random.randrange(1, 9)))]
        if random.random() < 0.5 or not self.last or len(ids) > self.most * 3 // 4:
            ids = [2, *(random.randrange(20, 500) for _ in range(random.randrange(1, self.most // 2)))]
        fields: dict[str, Any] = {
            "top_k": 0,
            "top_p": 1.0,
            "temperature": random.choice([0.0, 1.0]),
            "seed": random.randrange(1000),
            "return_token_ids": True,
        }
        if self.salted:
            fields["cache_salt"] = str(random.random())
        return {"prompt": ids, "max_tokens": random.randrange(1, self.most // 3), **fields}

    def compare(self, body: dict[str, Any], tokens: list[int]) -> None:
        self.solo.reset()
        self.solo.set_sampling(body["temperature"], 0, 1.0, body["seed"])
        self.solo.prefill(body["prompt"])
        expected, why = self.solo.generate(body["max_tokens"])
        if why == "eog":
            expected = [*expected, *self.solo.generate(1, None, False)[0]]
        expected = expected[: self.most - len(body["prompt"])]
        assert tokens == expected, f"{tokens} is not what a session alone writes, {expected}: {body}"
        self.last = [*body["prompt"], *tokens]
        self.found["completed"] += 1

    def ask(self) -> None:
        body = self.body()
        response = self.http.post("/v1/completions", json=body)
        if response.status_code == 429:
            self.found["refused"] += 1
            return time.sleep(0.02)
        assert response.status_code == 200, response.text
        self.found["cached"] += response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        self.compare(body, response.json()["choices"][0]["token_ids"])

    def stream(self) -> None:
        """At times a slow reader, at times one that leaves before the end."""
        body, tokens = self.body(), list[int]()
        slow, leaves = self.random.random() < 0.3, self.random.random() < 0.3
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            if response.status_code == 429:
                self.found["refused"] += 1
                return
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    tokens += event["choices"][0]["token_ids"]
                    if slow:
                        time.sleep(0.01)
                    if leaves and len(tokens) > 3:
                        self.found["left"] += 1
                        return
            assert line == "" or line == "data: [DONE]"
        self.compare(body, tokens)

    def talk(self) -> None:
        """A message more, of a conversation that begins anew where the caches would be full."""
        if not self.said:
            self.said = [{"role": "system", "content": self.random.choice(["Be brief.", "Be kind, and say what you know."])}]
        asked = [*self.said, {"role": "user", "content": self.random.choice(["And now?", "Tell me more.", "Why?"])}]
        body = {"messages": asked, "max_tokens": self.random.randrange(1, 12), "temperature": 0}
        response = self.http.post("/v1/chat/completions", json=body)
        if response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded":
            self.said, self.found["begun anew"] = [], self.found["begun anew"] + 1
            return
        if response.status_code == 429:
            self.found["refused"] += 1
            return time.sleep(0.02)
        assert response.status_code == 200, response.text
        answer = response.json()
        self.said = [*asked, {"role": "assistant", "content": answer["choices"][0]["message"]["content"] or ""}]
        self.found["talked"] += 1
        self.found["talked on"] += answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    def leave(self) -> None:
        """Within the request's head, within its body, behind it."""
        raw = json.dumps(self.body() | {"stream": self.random.random() < 0.5}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        whole = head.encode() + raw
        cut = self.random.choice([self.random.randrange(1, len(whole)), len(whole)])
        host, port = self.url.removeprefix("http://").split(":")
        with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port)), 30) as client:
            client.sendall(whole[:cut])
            time.sleep(self.random.random() * 0.05)
        self.found["left"] += 1

    def wrong(self) -> None:
        assert self.http.post("/v1/completions", json=self.random.choice(WRONG)).status_code == 400
        self.found["wrong"] += 1

    def huge(self) -> None:
        response = self.http.post("/v1/completions", json={"prompt": [20] * self.random.randrange(self.most, 50_000)})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        self.found["huge"] += 1


def soak(
    url: str, model: kiln.Model, chunk: int, seconds: float, clients: int, seed: int = 0, pause: float = 0.0, salted: bool = False,
    talks: bool = False,
) -> Counter[str]:
    """Raises what a client met that must not be."""
    end = time.monotonic() + seconds
    some = [Client(url, model, chunk, seed * 1000 + i, end, pause, salted, talks) for i in range(clients)]
    for client in some:
        client.start()
    for client in some:
        client.join(seconds + PATIENCE)
        if client.failed is not None:
            raise client.failed
        assert not client.is_alive(), "a client waits for ever"
    return sum((client.found for client in some), Counter())


def resident(pid: int) -> int:
    """Bytes in memory of a process but for pages of files, which the system drops and reads again as it likes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


# kiln serve, which gives free pages back to the system when it is told to.
TRIMMING = """
import ctypes, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: ctypes.CDLL(None).malloc_trim(0))
from kiln.exporter.cli import main
main(["serve", *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Part:
    """Of a soak, at its end: completed answers so far, resident bytes as they were and with free pages given back."""

    completed: int
    resident: int
    used: int


def grown(parts: Sequence[Part]) -> tuple[float, float]:
    """Growth of what is in use: as a share since the first fifth, bytes for each completed answer over the last half (least squares)."""
    warm, half = parts[len(parts) // 5], parts[len(parts) // 2 :]
    x, y = [p.completed for p in half], [p.used for p in half]
    mid = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mid[0]) ** 2 for a in x)
    slope = sum((a - mid[0]) * (b - mid[1]) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
    return parts[-1].used / warm.used - 1, slope


class Snapshots(threading.Thread):
    """Looks at a server's snapshots: the most bytes that they ever took, on the device and on the host, and how often one was there."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.over = url, threading.Event()
        self.most: Counter[str] = Counter()

    def run(self) -> None:
        while not self.over.wait(0.2):
            with contextlib.suppress(httpx.TransportError):  # a server with all hands full
                for name, value in re.findall(r"snapshot_(\w+){[^}]*} (\S+)", httpx.get(f"{self.url}/metrics", timeout=60).text):
                    self.most[name] = max(self.most[name], int(float(value)))


def idle(url: str, seconds: float = 60.0) -> None:
    """Waits until nothing is in work. AssertionError: something is stuck."""
    end = time.monotonic() + seconds
    while True:
        text = httpx.get(f"{url}/metrics", timeout=60).text
        if re.search(r"num_requests_running\S* 0\.0", text) and re.search(r"num_requests_waiting\S* 0\.0", text):
            return
        assert time.monotonic() < end, "something is stuck"
        time.sleep(0.2)


def measured(process: subprocess.Popen, url: str, completed: int) -> Part:
    idle(url)
    before = resident(process.pid)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    httpx.get(f"{url}/health", timeout=60)  # the handler has run by then
    return Part(completed, before, resident(process.pid))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--snapshot-gib", type=float, default=0.002, help="of snapshots on the device, and as much on the host")
    parser.add_argument("--parts", type=int, default=20, help="measurements")
    parser.add_argument("--salted", action="store_true", help="no prompt goes on where another ended; needed with a TQ4 cache")
    given = parser.parse_args()
    command = [sys.executable, "-c", TRIMMING, str(given.artifact), "--port", "0", "--device", given.device]
    command += ["--sessions", str(given.sessions), "--queue", str(given.clients // 2), "--snapshot-host-gib", str(given.snapshot_gib)]
    command += ["--snapshot-device-gib", str(given.snapshot_gib)] if given.device != "cpu" else []
    model, talks = kiln.Model(str(given.artifact), given.device), (given.artifact / "chat_template.jinja").exists()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = re.findall(r"http://\S+", process.stdout.readline())[0]
            total, parts, start = Counter[str](), list[Part](), time.monotonic()
            snapshots = Snapshots(url)
            snapshots.start()
            for part in range(given.parts):
                seconds = given.minutes * 60 / given.parts
                total += soak(url, model, model.prefill_chunk, seconds, given.clients, part, 0.0, given.salted, talks)
                parts.append(measured(process, url, total["completed"]))
                said = f"{parts[-1].resident / 1e6:.1f} MB, in use {parts[-1].used / 1e6:.1f} MB"
                print(f"{(time.monotonic() - start) / 60:.1f} min: {dict(sorted(total.items()))}, {said}", flush=True)
            snapshots.over.set()
            snapshots.join()
            print(f"snapshots, the most of each: {dict(sorted(snapshots.most.items()))}")
            for place in ("device_bytes", "host_bytes"):
                assert snapshots.most[place] <= given.snapshot_gib * (1 << 30), f"{place} of snapshots above their budget"
            assert not talks or (total["talked on"] and snapshots.most["kept"]), "no conversation went on, or nothing was kept for it"
            share, slope = grown(parts)
            print(f"since the first fifth {share:+.1%}; over the last half {slope:+.1f} bytes for each completed answer")
            assert share <= 0.05, f"memory grew from {parts[len(parts) // 5].used} to {parts[-1].used} bytes"
        finally:
            process.terminate()
    assert process.returncode == 0


if __name__ == "__main__":
    main()
