"""A pytest plugin: `-p tests.record --record FILE.json` writes which commit was tested where, and every test's outcome and seconds;
what failed is in FILE.failures.txt as soon as it does. A run that is cut short leaves what had ended, with exit_status null.

The commit is KILN_COMMIT where that is set (there may be no git on the machine), else git's, with "+changes" where files differ from it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

ROOT = Path(__file__).parents[1]
GROUP = re.compile(r"@[^@\[\]]*$")  # that pytest-xdist writes behind a name


def commit() -> str:
    if given := os.environ.get("KILN_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    head = git("rev-parse", "HEAD")
    return head + "+changes" * bool(git("status", "--porcelain", "--untracked-files=no")) if head else "unknown"


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": torch.__version__,
            "triton": triton.__version__, "system": platform.platform()}  # fmt: skip


def reason(report: pytest.TestReport) -> str:
    """Why it was skipped, or how its failure begins."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " | ".join(str(crash.message if crash else report.longrepr).splitlines())[:600]


class Record:
    EVERY = 5.0  # seconds from one writing of an unfinished run to the next

    def __init__(self, path: Path):
        self.path, self.began, self.tests, self.written, self.workers = path, time.monotonic(), {}, 0.0, 1
        self.failures = path.with_suffix(".failures.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.failures.unlink(missing_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = GROUP.sub("", report.nodeid)
        test = self.tests.setdefault(name, {"name": name, "outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.outcome != "passed" and test["outcome"] == "passed":
            test["outcome"] = "error" if report.outcome == "failed" and report.when != "call" else report.outcome
            test["reason"] = reason(report)
        if report.when == "teardown" and time.monotonic() - self.written > self.EVERY:
            self.write(None)
            self.written = time.monotonic()
        if report.outcome == "failed":  # at once: a run that is cut short writes no record
            with self.failures.open("a") as file:
                file.write(f"---- {report.nodeid} ({report.when})\n{report.longreprtext}\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.workers = getattr(session.config.option, "numprocesses", None) or 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.write(int(exitstatus))

    def write(self, exit_status: int | None) -> None:
        tests = sorted(self.tests.values(), key=lambda test: test["name"])
        counts = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "failed", "error", "skipped")}
        record = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
                  "workers": self.workers, "seconds": round(time.monotonic() - self.began, 2),
                  "exit_status": exit_status, "counts": counts, "tests": tests}  # fmt: skip
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE.json", help="write the commit, the machine and every test's outcome here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist's processes only the one that sees every report
        config.pluginmanager.register(Record(path.resolve()), "kiln-record")
