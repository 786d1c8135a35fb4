"""A chat template -> its renderings, by `render.py` in a process of its own that lives as long as the `Renderer`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = Path(__file__).with_name("render.py")
WALL_SECONDS = 60  # of one job
CPU_SECONDS = 4  # of one job: a large template takes a hundredth of one for a turn
LONGEST = 1 << 20  # characters of one rendering


class TemplateError(Exception):
    """A template that fails; the text continues a sentence: "the chat template cannot ...: TEXT"."""


class Renderer:
    """Renderings of one template. A job that breaks its limits costs the process, and the next job starts another. Any thread may call."""

    def __init__(self, template: str, longest: int = LONGEST, seconds: int = CPU_SECONDS):
        self.template, self.longest, self.seconds = template, longest, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, turns: Sequence[Mapping[str, Any]]) -> tuple[list[str | TemplateError], bool]:
        """Each rendering or why there is none, and whether the template asked for the date.

        Raises TemplateError where the template as a whole fails.
        """
        once: dict[int, tuple[int, Any]] = {}  # turns of one conversation share its messages

        def number(messages: Sequence[Any]) -> list[int]:
            return [once.setdefault(id(m), (len(once), m))[0] for m in messages]

        numbered = [{**turn, "messages": number(turn["messages"])} if "messages" in turn else turn for turn in turns]
        job = {"template": self.template, "messages": [m for _, m in once.values()], "turns": numbered}
        with self._lock:
            answer = self._answer(json.dumps(job | {"longest": self.longest, "seconds": self.seconds}).encode() + b"\n")
        if "error" in answer:
            raise TemplateError(answer["error"])
        found: list[str | TemplateError] = []
        before = ""
        for turn in answer["turns"]:
            if "error" not in turn:
                before = before[: turn["same"]] + turn["text"]
            found.append(TemplateError(turn["error"]) if "error" in turn else before)
        return found, answer["dated"]

    def _answer(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            pipe = subprocess.PIPE
            self._process = subprocess.Popen([sys.executable, "-X", "utf8", str(PROGRAM)], stdin=pipe, stdout=pipe, stderr=pipe)
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(WALL_SECONDS, stop)
        timer.daemon = True
        timer.start()
        try:
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answered = process.stdout.readline()
            except BrokenPipeError:
                answered = b""
            if answered.endswith(b"\n"):
                return json.loads(answered)
            said = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            if late.is_set():
                return {"error": f"it takes more than {WALL_SECONDS} s"}
            return {"error": "it takes too much time or memory" if process.wait() < 0 else said or "it ended without a word"}
        except BaseException:
            process.kill()  # what it would answer now is nobody's
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the process; a later job starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
