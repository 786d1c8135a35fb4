"""Temporary folders and files: where they are made, and that none stays, however the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from kiln.exporter import temporary
from kiln.exporter.compiler import workers
from kiln.exporter.errors import KilnError
from kiln.exporter.files import replacing
from kiln.exporter.temporary import working_folder
from tests.conftest import WAIT

ROOT = Path(__file__).parents[2]

# Holds a working folder, a file that is being written and a worker with a child, and waits in the given way.
HOLDER = """
import subprocess, sys, threading, time
from pathlib import Path
from kiln.exporter.compiler import workers
from kiln.exporter.files import replacing
from kiln.exporter.interrupt import ending_cleanly, held
from kiln.exporter.temporary import working_folder

def main():
    with ending_cleanly(), working_folder() as folder, workers.none_left(), replacing(Path(sys.argv[1]), "it") as f:
        f.write(b"half")
        f.flush()
        workers._IMPORTS = ()
        worker = workers.Worker()
        worker.start(subprocess.check_call, ["sh", "-c", f"echo $PPID $$; echo x > {folder}/child; sleep 600"])
        while not (folder / "child").exists():
            time.sleep(0.01)
        print(folder, flush=True)
        if sys.argv[2] == "wait":
            worker.result()
        elif sys.argv[2] == "print":
            while True:
                print("x" * 1000, flush=True)
                time.sleep(0.01)
        else:
            try:
                while True:
                    try:
                        time.sleep(600)
                    except BaseException:  # as a library may do
                        pass
            finally:
                pass

if __name__ == "__main__":
    main()
"""


def alive(pid: int) -> bool:
    return temporary._started(pid) is not None


def start(tmp_path: Path, way: str) -> tuple[subprocess.Popen, list[int]]:
    """The holder, and the processes of its worker: they are those of the child's line."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "holder.py").write_text(HOLDER)
    command = [sys.executable, str(tmp_path / "holder.py"), str(tmp_path / "out"), way]
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    children = [int(word) for word in process.stdout.readline().split()]
    folder = Path(process.stdout.readline().strip())
    assert folder.parent == tmp_path / "tmp" and (folder / "child").exists() and len(children) == 2 and all(map(alive, children))
    return process, children


def gone(children: list[int], seconds: float = WAIT) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, children)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("way", ["wait", "swallow"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path, number, way):
    process, children = start(tmp_path, way)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 128 + number and stderr == f"kiln: ended by {number.name}\n"
    assert gone(children) and not list((tmp_path / "tmp").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holder.py", "tmp"]


def test_a_second_signal_does_not_disturb_the_first(tmp_path):
    process, children = start(tmp_path, "wait")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    process.communicate(timeout=WAIT)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
    assert gone(children) and not list((tmp_path / "tmp").iterdir())


def test_a_closed_pipe_leaves_nothing(tmp_path):
    process, children = start(tmp_path, "print")
    process.stdout.close()
    assert process.wait(timeout=WAIT) == 1
    assert gone(children) and not list((tmp_path / "tmp").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["holder.py", "tmp"]


def test_a_killed_process_takes_its_workers_along_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    process, children = start(tmp_path, "wait")
    process.kill()
    process.communicate(timeout=WAIT)
    assert gone(children), "a compiler outlived its export"
    assert list((tmp_path / "tmp").iterdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with working_folder() as folder:
        assert list((tmp_path / "tmp").iterdir()) == [folder]


def test_a_killed_worker_is_told_and_takes_its_compilers_along(tmp_path):
    process, children = start(tmp_path, "wait")
    os.kill(children[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == 1 and "a compiling process was killed by SIGKILL; is there enough memory?" in stderr
    assert gone(children) and not list((tmp_path / "tmp").iterdir())


def test_an_ignored_signal_stays_ignored(tmp_path):
    """`nohup kiln export`: the terminal may go."""
    script = 'trap "" HUP; exec "$0" -c "$1"'
    code = """
import os, signal
from kiln.exporter.interrupt import ending_cleanly
with ending_cleanly():
    os.kill(os.getpid(), signal.SIGHUP)
    print("alive")
"""
    assert subprocess.run(["sh", "-c", script, sys.executable, code], capture_output=True, text=True, cwd=ROOT).stdout == "alive\n"


def test_the_working_folder_is_everybodys_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = tempfile.gettempdir()
    with working_folder() as folder:
        assert folder.parent == tmp_path and os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder)
        assert temporary.lasting() == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        with working_folder() as same:
            assert same == folder
        assert folder.exists()
    assert not list(tmp_path.iterdir()) and os.environ["TMPDIR"] == str(tmp_path) and tempfile.gettempdir() == before


def test_kilns_own_variable_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setenv("KILN_TMPDIR", str(tmp_path))
    with working_folder() as folder:
        assert folder.parent == tmp_path


def test_a_temporary_folder_that_cannot_be_used(tmp_path, monkeypatch):
    def fails(match: str) -> None:
        with pytest.raises(KilnError, match=match) as e, working_folder():
            pass
        assert "set TMPDIR to" in str(e.value) and "\n" not in str(e.value)

    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    fails("TMPDIR=.*none is no folder")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    fails("TMPDIR=.*file is no folder")
    monkeypatch.setenv("TMPDIR", "/proc")  # nobody can make a folder there
    fails("/proc")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(temporary.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(1, 1, 5 << 20))
    fails("TMPDIR=.* has 5 MiB free, temporary files need 64")
    monkeypatch.delenv("TMPDIR")
    fails("^/tmp has 5 MiB free")


def test_a_relative_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "t")
    with working_folder() as folder:
        assert folder.is_absolute() and folder.parent == tmp_path / "t"


def test_replacing_with_a_long_name(tmp_path):
    for name in ("n" * 255, "窯" * 85):
        with replacing(tmp_path / name, "it") as f:
            f.write(b"x")
        assert [p.name for p in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_no_worker_outlives_the_block(monkeypatch):
    monkeypatch.setattr(workers, "_IMPORTS", ())
    with workers.none_left():
        waiting, working = workers.Worker(), workers.Worker()
        working.start(time.sleep, 600)
        nursery = workers._nursery
        assert nursery and all(alive(pid) for pid in (waiting._pid, working._pid, nursery._process.pid))
    assert not any(map(alive, (waiting._pid, working._pid))) and not nursery._process.is_alive() and not workers._started


def test_what_else_was_started_ends_too(tmp_path):
    """`kiln bench` measures runners: they get SIGTERM when it is ended itself."""
    code = """
import subprocess, sys
from kiln.exporter.interrupt import ending_cleanly
with ending_cleanly():
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    child.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(process.stdout.readline())
    process.terminate()
    process.communicate(timeout=WAIT)
    assert process.returncode == 128 + signal.SIGTERM and gone([child])
