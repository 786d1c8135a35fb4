"""Where an artifact goes: what `--out` may be, checked before any work; and how a finished artifact gets there, whole or not at all.

No torch here: `kiln export` refuses within its first second.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pwd
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kiln.exporter.artifact.link import is_weights
from kiln.exporter.errors import KilnError
from kiln.exporter.files import short
from kiln.exporter.interrupt import held
from kiln.exporter.temporary import owned, stale, sweep

MANIFEST = "manifest.json"
FORCE = "--force replaces artifacts only"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@dataclass(frozen=True)
class Output:
    """An `--out` that passed `check_output`."""

    path: Path  # absolute
    in_place: bool  # the folder is there, empty, and stays: its files are moved into it one by one
    replaces: tuple[int, int] | None  # device and inode of the artifact that is replaced

    @property
    def parent(self) -> Path:
        """The folder that the temporary one is made in."""
        return self.path if self.in_place else self.path.parent

    @property
    def pattern(self) -> str:
        """Glob of the temporary folders, of this process and of others."""
        return ".kiln.*.partial" if self.in_place else f".{_escaped(short(self.path.name))}.*.partial"

    def holder(self) -> Path:
        """The temporary folder of this process."""
        return self.parent / f".{'kiln' if self.in_place else short(self.path.name)}.{os.getpid()}.partial"


def check_output(out: Path, force: bool = False, sources: Sequence[Path] = ()) -> Output:
    """`out` as a place for an artifact. `sources`: files that must not be in a folder that is replaced. Raises KilnError."""
    try:
        return _check(out, force, sources)
    except OSError as e:
        raise KilnError(f"--out {out}: {e.strerror}; name another") from e


def _check(out: Path, force: bool, sources: Sequence[Path]) -> Output:
    if out.name and not os.path.lexists(out):
        _recover(Output(out.absolute(), False, None))
    link = out.is_symlink()
    if link and not out.is_dir():
        raise KilnError(f"--out {out} is a link to {os.readlink(out)}, which is no folder; name another")
    if not link and not os.path.lexists(out):
        parent = _existing(out.absolute().parent)
        if not parent.is_dir():
            raise KilnError(f"--out {out}: {parent} is no folder; name another")
        _check_writable(out, parent)
        new = out.absolute().relative_to(parent).parts
        if ".." in new:
            raise KilnError(f"--out {out} leads through a folder that is not there; name another")
        if max(len(os.fsencode(part)) for part in new) > os.pathconf(parent, "PC_NAME_MAX"):
            raise KilnError(f"--out {out}: {os.strerror(errno.ENAMETOOLONG)}; name another")
        return Output(out.absolute(), False, None)
    if not out.is_dir():
        raise KilnError(f"--out {out} is a file; name a folder")
    path = out.resolve()
    mount, here = _is_mount(path), os.path.samefile(path, ".")
    if path in (Path("/"), Path.home()) or str(path) in {user.pw_dir for user in pwd.getpwall()}:
        raise KilnError(f"--out {out} is a home folder or the root; name a folder inside it")
    if _is_empty(path, mount):
        in_place = mount or here or link or not os.access(path.parent, os.W_OK | os.X_OK)
        _check_writable(out, path if in_place else path.parent)
        return Output(path, in_place, None)
    if mount:
        raise KilnError(f"--out {out} is a mount point and not empty, and cannot be replaced; empty it, or name a folder inside it")
    if not force:
        raise KilnError(f"--out {out} exists and is not empty; remove it or name another ({FORCE})")
    if link:
        raise KilnError(f"--out {out} is a link, and --force replaces no link's target; name {path} itself")
    if here or path in Path.cwd().resolve().parents:
        raise KilnError(f"--out {out} holds the current directory and cannot be replaced; change to another, or name another --out")
    for source in sources:
        if path in source.resolve().parents:
            raise KilnError(f"--out {out} holds {source}, which would be deleted; name another --out")
    _check_ours(out, path)
    _check_writable(out, path.parent)
    return Output(path, False, _identity(path))


def _check_ours(out: Path, path: Path) -> None:
    """Raises KilnError unless `path` is an artifact and nothing but files, and links to weights that lie elsewhere."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != "kiln":
        raise KilnError(f"--out {out} is not an artifact of Kiln ({FORCE}); remove it yourself or name another")
    for entry in sorted(path.iterdir()):
        weights = is_weights(manifest, entry.name)
        if weights and entry.is_symlink() and path not in entry.resolve().parents:
            continue  # the link goes, its target stays
        if weights or entry.is_symlink() or not entry.is_file() or entry.suffix.lower() == ".gguf":
            raise KilnError(f"--out {out} holds {entry.name}, which is no part of an artifact ({FORCE}); move it away or name another")


def _is_mount(path: Path) -> bool:
    """A part of the same file system that is mounted there counts, too, which os.path.ismount does not see."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            if re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) == os.fsencode(path):
                return True
    return os.path.ismount(path)


def _is_empty(path: Path, mount: bool) -> bool:
    """Whether there is nothing in a folder but what dead exports left, and what a file system begins with."""
    return all((mount and entry.name == "lost+found") or (entry.match(".*.partial") and stale(entry)) for entry in path.iterdir())


def _check_writable(out: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise KilnError(f"--out {out}: {folder} cannot be written; name another")


def check_space(output: Output, needed: int) -> None:
    """Raises KilnError where an artifact of `needed` bytes does not fit beside what is there."""
    free = shutil.disk_usage(_existing(output.parent)).free
    if free < needed:
        sizes = f"{needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free on that disk"
        raise KilnError(f"--out {output.path}: {sizes}; make room or name another")


@contextlib.contextmanager
def staged(output: Output) -> Iterator[Path]:
    """A folder to make an artifact in, which goes to `output` when the block ends without an error, and vanishes otherwise."""
    missing = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    done = False
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            sweep(output.parent, output.pattern)
        except OSError as e:
            raise KilnError(f"--out {output.path}: {e.strerror}; name another") from e
        with contextlib.ExitStack() as stack:
            try:
                holder = stack.enter_context(owned(output.holder()))
                new = holder / "new"
                new.mkdir()
            except OSError as e:
                raise KilnError(f"--out {output.path}: {output.parent} cannot be written: {e.strerror}; name another") from e
            yield new
            with held():
                try:
                    _fill(new, output.path) if output.in_place else _place(new, output, holder)
                except OSError as e:
                    raise KilnError(f"--out {output.path}: cannot be put there: {e.strerror}") from e
            done = True
    finally:
        for folder in missing if not done else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _fill(new: Path, path: Path) -> None:
    """Move the files into the empty folder `path`, the manifest last."""
    if not all(entry == new.parent or entry.name == "lost+found" for entry in path.iterdir()):
        raise KilnError(f"--out {path} was empty when the export began and is not now; nothing was written")
    for file in sorted(new.iterdir(), key=lambda f: f.name == MANIFEST):
        file.rename(path / file.name)


def _place(new: Path, output: Output, holder: Path) -> None:
    """Rename the folder to its place, where there is nothing, an empty folder, or the artifact it replaces."""
    path = output.path
    if output.replaces is None or not os.path.lexists(path):
        try:
            new.rename(path)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise KilnError(f"--out {path} was made by something else during the export and is kept; name another") from e
            raise
        return
    if _identity(path) != output.replaces:
        raise KilnError(f"--out {path} was changed by something else during the export and is kept; name another")
    _check_ours(path, path)
    if _exchange(new, path):
        return
    old = holder / "old"
    path.rename(old)  # `_recover` brings it back where this process dies before the next line
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise


def _recover(output: Output) -> None:
    """Bring back an artifact that a dead export had set aside and not replaced yet."""
    for holder in output.parent.glob(output.pattern):
        if (holder / "old").is_dir() and not os.path.lexists(output.path) and stale(holder):
            (holder / "old").rename(output.path)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _existing(folder: Path) -> Path:
    """The nearest of `folder` and its parents that exists."""
    return next(f for f in (folder, *folder.parents) if os.path.lexists(f))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
