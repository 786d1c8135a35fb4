"""Folders that live as long as this process: each names its owner, and a later process removes those whose owner is dead."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import held, undoing

OWNER = ".owner"  # a file in every such folder; its maker holds a lock on it
MARK = "temporary folder of kiln"
WORK = "kiln-work-"  # begins the name of a working folder in TMPDIR
NEEDED = 64 << 20  # free bytes of TMPDIR that an export asks for
_work: Path | None = None


@contextlib.contextmanager
def owned(path: Path, mode: int = 0o700) -> Iterator[Path]:
    """A new folder `path`, removed when the block ends, when a signal ends the process, or by `sweep` of a later process."""
    made, lock = False, list[int]()

    def remove() -> None:
        for _ in range(3 if made else 0):  # a thread or a dying process may be writing into it
            _remove(path)
            if not path.exists():
                break
            time.sleep(0.05)
        while lock:
            os.close(lock.pop())

    with undoing(remove):
        with held():
            path.mkdir(mode)
            made = True
        lock.append(os.open(path / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock[0], json.dumps({"what": MARK, "host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}).encode())
        yield path


def stale(folder: Path) -> bool:
    """Whether `folder` is one of `owned` whose owner is dead. Anything else, or what cannot be told, is not."""
    try:
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
            return False
        owner = _owner(folder)
        if owner is None:  # killed before it had signed, or after it had emptied it: the name tells who
            number = re.search(r"[.-](\d+)[.-][a-z0-9]+$", folder.name)
            empty = all(entry.name == OWNER and not _parsed(entry) for entry in folder.iterdir())
            return number is not None and empty and (_started(int(number[1])) is None or time.time() - folder.stat().st_mtime > 60)
        if owner["host"] == _host():
            return _started(owner["pid"]) != owner["started"]
        with (folder / OWNER).open() as f:  # of another container, or from before a restart
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _parsed(path: Path) -> object:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes()[:4096])
    return None


def _owner(folder: Path) -> dict | None:
    owner = _parsed(folder / OWNER)
    return owner if isinstance(owner, dict) and owner.get("what") == MARK else None


def sweep(parent: Path, pattern: str) -> None:
    """Remove the stale folders in `parent` whose names match the glob `pattern`."""
    for folder in parent.glob(pattern):
        if stale(folder):
            _remove(folder)


def _remove(folder: Path) -> None:
    """The owner's name goes last: what a kill leaves of it can still be swept."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != OWNER:
                shutil.rmtree(entry, ignore_errors=True)
                entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / OWNER).unlink(missing_ok=True)
        folder.rmdir()


def temporary_root() -> Path:
    """KILN_TMPDIR, else TMPDIR, else /tmp. KilnError where it cannot be used."""
    name = next((n for n in ("KILN_TMPDIR", "TMPDIR") if os.environ.get(n)), None)
    root = Path(os.path.abspath(os.environ[name] if name else "/tmp"))
    said = f"{name}={root}" if name else str(root)
    advice = "set TMPDIR to a folder that can be written"
    if not root.is_dir():
        raise KilnError(f"{said} is no folder; {advice}")
    if not os.access(root, os.W_OK | os.X_OK):
        raise KilnError(f"{said}: the folder for temporary files cannot be written; {advice}")
    if (free := shutil.disk_usage(root).free) < NEEDED:
        raise KilnError(f"{said} has {free >> 20} MiB free, temporary files need {NEEDED >> 20}; make room, or {advice}")
    return root


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A private folder for temporary files, which it is for this process and its children, too, while the block runs.

    Within another such block it is that one's.
    """
    global _work
    if _work is not None:
        yield _work
        return
    root = temporary_root()
    sweep(root, f"{WORK}*")
    saved, saved_default = os.environ.get("TMPDIR"), tempfile.tempdir
    path = root / f"{WORK}{os.getpid()}-{os.urandom(4).hex()}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owned(path))
        except OSError as e:
            raise KilnError(f"{root}: no temporary folder can be made there: {e.strerror}; set TMPDIR to one where it can") from e
        os.environ["TMPDIR"] = tempfile.tempdir = str(path)
        _work = path
        try:
            yield path
        finally:
            _work, tempfile.tempdir = None, saved_default
            os.environ.pop("TMPDIR")
            os.environ |= {} if saved is None else {"TMPDIR": saved}


def lasting() -> Path:
    """The folder for temporary files that outlive the working folder, in this process and its children."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(WORK) else folder


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@functools.cache
def _host() -> str:
    """One start of one machine, and the processes that see the same process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


