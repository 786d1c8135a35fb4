"""Servers of the tests: one over the small real artifact, and one over a scripted engine with Gemma 4's own vocabulary and template."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import kiln
from kiln.exporter.serve.app import PAGE, application
from kiln.exporter.serve.served import Served
from kiln.exporter.serve.server import config, listen
from kiln.exporter.serve.settings import Settings
from kiln.exporter.serve.steps.engine import Busy, Job, Outcome
from tests.conftest import WAIT, gemma4_vocabulary, shared
from tests.timeline import FIXTURES

KEY = "a-key-of-the-tests"
SESSIONS, QUEUE = 2, 6


@dataclasses.dataclass
class Running:
    """A server in a thread of its own."""

    url: str
    served: Served

    def idle(self, seconds: float = WAIT) -> bool:
        """Whether nothing is in work within that time."""
        end = time.monotonic() + seconds
        while any(self.served.engine.load()[:2]):
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True


@contextlib.contextmanager
def running(served: Served, folder: Path = PAGE) -> Iterator[Running]:
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(config(application(served, folder)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", served)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        served.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(names=("small", "other"), sessions=SESSIONS, queue=QUEUE, chunk=16, hosts=("localhost", "127.0.0.1"), ping=0.2)


@pytest.fixture(scope="session")
def real(talking: Path, settings: Settings) -> Iterator[Running]:
    """The small artifact, which has 96 slots."""
    with running(Served.load(talking, "cpu", 1, settings)) as found:
        yield found


class Scripted:
    """An engine without a model: each job gets the next list of ids, at once or when `step` is set; then it has reached its length."""

    def __init__(self) -> None:
        self.scripts: deque[Sequence[int]] = deque()
        self.jobs: list[Job] = []
        self.broken, self.room = "", 1000
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, jobs: Sequence[Job]) -> None:
        if len(jobs) > self.room:
            raise Busy
        for job in jobs:
            self.jobs.append(job)
            threading.Thread(target=self._run, args=(job, list(self.scripts.popleft())), daemon=True).start()

    def _run(self, job: Job, ids: list[int]) -> None:
        job.started = job.read = time.monotonic()
        new = 0
        while ids and new < job.most:
            while not self.gate.wait(0.01) and not job.cancelled:
                pass
            if job.cancelled:
                return self._end(job, "cancelled")
            said = job.take(ids.pop(0))
            new += 1
            if said is False:
                return self._end(job, "taken")
            if said is not True:
                new += len(said) - 1
        self._end(job, "length")

    def _end(self, job: Job, why: str) -> None:
        job.over = True
        job.ended(job, Outcome(why))

    def cancel(self, job: Job) -> None:
        job.cancelled = True

    def close(self) -> None:
        self.gate.set()

    def load(self) -> tuple[int, int, float]:
        return sum(not job.over for job in self.jobs), 0, 0.0


@dataclasses.dataclass
class Script(Running):
    engine: Scripted

    def will_say(self, *pieces: str | int) -> list[int]:
        """The next answer: texts and ids of special tokens."""
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else self.served.vocabulary.ids(piece)
        self.engine.scripts.append(ids)
        return ids


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a server reads of an artifact of Gemma 4 besides code and weights."""
    tokenizer, ends = gemma4_vocabulary(tmp_path_factory)

    def write(path: Path) -> None:
        path.mkdir()
        (path / "tokenizer.json").hardlink_to(tokenizer)
        (path / "chat_template.jinja").write_text((FIXTURES / "gemma4-chat-template.jinja").read_text())
        inputs = [{"name": name} for name in ("tokens", "pos", "temperature", "top_k", "top_p", "seed")]
        manifest = {
            "tokenizer": {"file": "tokenizer.json", "bos": 2, "eog": ends},
            "chat": {"tokens": {"bos_token": "<bos>"}},
            "entry_points": {"decode": {"inputs": inputs}},
            "weights": {"header": {"sha256": "0" * 64}},
        }
        (path / "manifest.json").write_text(json.dumps(manifest))

    return shared(tmp_path_factory, "gemma4-to-serve", write)


@pytest.fixture(scope="session")
def script(gemma: Path) -> Iterator[Script]:
    engine, tokenizer = Scripted(), kiln.Tokenizer(str(gemma / "tokenizer.json"))
    manifest: dict[str, Any] = json.loads((gemma / "manifest.json").read_text())
    settings = Settings(names=("gemma",), keys=(KEY.encode(), b"another-key-of-the-tests"), ping=0.2)
    with running(Served(gemma, manifest, tokenizer, 8192, engine, settings)) as found:
        yield Script(found.url, found.served, engine)
