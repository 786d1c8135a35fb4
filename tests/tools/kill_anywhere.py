"""Signals at random moments in each phase of `kiln export` and of `kiln run`: what they leave behind, as a table.

    python -m tests.tools.kill_anywhere [--moments 10] [--seed 0] [--only export|run] [--signals TERM,INT] [--gguf FILE] \\
      [--weights copy]

Exit code 1 where anything is left: a file in TMPDIR or beside --out, a process, or an --out that is neither absent nor whole.
After SIGKILL, which nobody can handle, what is left is counted after the next export of the same name has begun.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kiln.exporter.artifact.verify import verify
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.runner import runner

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "gemma4-tiny-dense.gguf"
RUNNER = Path(runner())
# A phase ends where its words are printed; the last one with the process.
EXPORT_PHASES = {"starting": "total ", "weights": "compiling for", "compiling": "traced in", "finishing": None}
RUN_PHASES = {"loading": "", "generating": None}
BEGIN_ANOTHER = """
import sys
from pathlib import Path
from kiln.exporter.artifact.output import check_output, staged
from kiln.exporter.temporary import working_folder
try:
    with working_folder(), staged(check_output(Path(sys.argv[1]), force=True)):
        raise StopIteration
except StopIteration:
    pass
"""


@dataclass
class Watched:
    """A process whose output is read while it runs."""

    process: subprocess.Popen
    phases: dict[str, str | None]
    ends: dict[str, float] = field(default_factory=dict)  # of the phases so far, in seconds from the start
    output: str = ""

    def __post_init__(self) -> None:
        self._start, self._changed, self._closed = time.monotonic(), threading.Condition(), 0
        self._readers = [threading.Thread(target=self._read, args=(pipe,)) for pipe in (self.process.stdout, self.process.stderr)]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe) -> None:
        while data := os.read(pipe.fileno(), 4096):
            with self._changed:
                self.output += data.decode(errors="replace")
                for phase, words in self.phases.items():
                    if words is None or words not in self.output:
                        break
                    self.ends.setdefault(phase, time.monotonic() - self._start)
                self._changed.notify_all()
        with self._changed:
            self._closed += 1
            self._changed.notify_all()

    def wait_for(self, phase: str, timeout: float) -> bool:
        """Until the phase has begun; False where the process ended before."""
        before = [p for p, _ in itertools.takewhile(lambda item: item[0] != phase, self.phases.items())]
        with self._changed:
            self._changed.wait_for(lambda: all(p in self.ends for p in before) or self._closed == 2, timeout)
            return all(p in self.ends for p in before)

    def finish(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join()
        self.ends[list(self.phases)[-1]] = time.monotonic() - self._start
        return code


@dataclass(frozen=True)
class Outcome:
    code: int
    finished: bool  # before the signal came
    files: tuple[str, ...]  # left in TMPDIR and beside --out
    processes: int
    whole: bool  # --out is absent or an artifact
    output: str

    def clean(self, number: int) -> bool:
        """A shell shows 128 + number for both codes; the negative one is of a Python that has let go of its handlers, at its end."""
        expected = (0,) if self.finished else (-number,) if number == signal.SIGKILL else (128 + number, -number)
        return self.code in expected and not self.files and not self.processes and self.whole


def start(command: list, temporary: Path, phases: dict[str, str | None]) -> Watched:
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    return Watched(process, phases)


def interrupt(command: list, folder: Path, phases: dict[str, str | None], phase: str, delay: float, number: int) -> Outcome:
    """Run `command` with TMPDIR and --out in `folder`, and send the signal `delay` seconds into the phase."""
    temporary = folder / "tmp"
    watched = start(command, temporary, phases)
    reached = watched.wait_for(phase, 600)
    if reached:
        while watched.process.poll() is None and not catches(watched.process.pid, signal.SIGTERM):  # before its first statement
            time.sleep(0.001)
        time.sleep(delay)
    finished = watched.process.poll() is not None or not reached
    if not finished:
        watched.process.send_signal(number)
    code = watched.finish(60)
    finished = finished or code == 0
    end = time.monotonic() + (20 if number == signal.SIGKILL else 3)
    while (processes := list(processes_of(temporary))) and time.monotonic() < end:
        time.sleep(0.05)
    out = folder / "artifact"
    if number == signal.SIGKILL:
        begin_another(out, temporary)
    try:
        whole = not out.exists() or verify(out) == []
    except KilnError:
        whole = False
    left = (*temporary.iterdir(), *(p for p in folder.iterdir() if p.name not in ("tmp", "artifact")))
    return Outcome(code, finished, tuple(sorted(str(p.relative_to(folder)) for p in left)), len(processes), whole, watched.output)


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal. One that has ended has none."""
    with open(f"/proc/{process}/status") as status:
        caught = next((line for line in status if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def begin_another(out: Path, temporary: Path) -> None:
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BEGIN_ANOTHER, str(out)], env=environment, check=True)


def processes_of(temporary: Path) -> Iterator[int]:
    """Those whose TMPDIR is the folder or in it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "ZX" and any(v.startswith(b"TMPDIR=" + os.fsencode(temporary)) for v in variables):
                yield int(entry.name)


def export_command(gguf: Path, folder: Path, weights: str = "gguf") -> list:
    options = ("--target", "cpu", "--max-seq-len", 64, "--prefill-chunk", 64, "--weights", weights, "--force")
    return [sys.executable, "-m", "exporter", "export", "--gguf", gguf, "--out", folder / "artifact", *options]


def run_command(folder: Path) -> list:
    return [RUNNER, folder / "artifact", "--tokens", "2,3,4", "--no-eog", "--max-new-tokens", 60]


def spans(command: list, folder: Path, phases: dict[str, str | None]) -> dict[str, float]:
    """Seconds of each phase of an undisturbed run."""
    watched = start(command, folder / "tmp", phases)
    if watched.finish(900):
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{watched.output}")
    ends = [watched.ends[phase] for phase in phases]
    return dict(zip(phases, (b - a for a, b in zip([0.0, *ends], ends, strict=False)), strict=True))


def survey(job: str, command: list, phases: dict[str, str | None], folder: Path, numbers: list[signal.Signals],
           chance: random.Random) -> int:  # fmt: skip
    """A line for each phase; how many runs left something behind, or gave another exit code than their signal's."""
    wrong = 0
    for phase, length in spans(command, folder, phases).items():
        outcomes = []
        for i, number in enumerate(numbers):
            if job == "export" and i % 2:  # once beside an old artifact, once alone
                shutil.rmtree(folder / "artifact", ignore_errors=True)
            if job == "run" and number == signal.SIGKILL:  # what that leaves is not for the next run to remove
                number = signal.SIGTERM
            outcome = interrupt(command, folder, phases, phase, chance.uniform(0, length), number)
            outcomes.append(outcome)
            if not outcome.clean(number):
                wrong += 1
                told = outcome.output.strip().splitlines()[-1:] or [""]
                print(f"  {signal.Signals(number).name} in {phase}: code {outcome.code}, left {outcome.files}, {told[0]}")
            for entry in (folder / "tmp").iterdir():
                shutil.rmtree(entry, ignore_errors=True)
        files, processes = sum(len(o.files) for o in outcomes), sum(o.processes for o in outcomes)
        broken, reached = sum(not o.whole for o in outcomes), sum(not o.finished for o in outcomes)
        print(f"{job:8} {phase:10} {length:7.2f} {len(numbers):8d} {reached:8d} {files:11d} {processes:10d} {broken:7d}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["export", "run"])
    parser.add_argument("--signals", default="TERM,INT,HUP,KILL", help="by turns")
    parser.add_argument("--gguf", type=Path, default=FIXTURE)
    parser.add_argument("--weights", choices=["gguf", "copy"], default="gguf")
    options = parser.parse_args()
    chance, wrong = random.Random(options.seed), 0
    names = options.signals.split(",")
    numbers = [signal.Signals[f"SIG{names[i % len(names)]}"] for i in range(options.moments)]
    with tempfile.TemporaryDirectory(prefix="kill-anywhere-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        export = export_command(options.gguf, folder, options.weights)
        print(f"{'command':8} {'phase':10} {'seconds':>7} {'moments':>8} {'reached':>8} {'files left':>11} {'processes':>10} {'broken':>7}")
        if options.only != "run":
            wrong += survey("export", export, EXPORT_PHASES, folder, numbers, chance)
        if options.only != "export":
            spans(export, folder, EXPORT_PHASES)
            wrong += survey("run", run_command(folder), RUN_PHASES, folder, numbers, chance)
    print(f"{wrong} runs left something behind or gave another exit code")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
