"""Code packages that `kiln run MODEL.gguf` made: a folder of the user's, an artifact for each model, options and target.

An entry's name ends with two keys: of the code (architecture, shapes, block types, options, target, this Kiln) and of what else the
artifact has of its file (tokenizer, chat template, metadata). A file that differs in the second alone takes the code of an entry that is
there.
No torch here: a package that is there is played at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kiln.exporter.artifact.manifest import read_manifest
from kiln.exporter.artifact.output import MANIFEST
from kiln.exporter.errors import KilnError
from kiln.exporter.files import short
from kiln.exporter.interrupt import undoing
from kiln.exporter.progress import say
from kiln.exporter.source.config import read_config, tensor_problems
from kiln.exporter.source.gguf import GGUFFile, open_gguf
from kiln.exporter.source.weights import derived_constants, plan_weights
from kiln.exporter.temporary import sweep

KEY = 16  # hex digits of a key in a name
ROOMS = ("exporter", "passes", "custom_ops", "configs")  # what makes a package


@dataclass(frozen=True)
class CodeOptions:
    """What of `kiln run MODEL.gguf` decides what is compiled. target: "cpu" or "sm_NN"."""

    target: str
    max_seq_len: int | None = None
    kv_cache: str = "f16"


@dataclass(frozen=True)
class Wanted:
    """The entry for a model file. title: of the name, for people."""

    title: str
    code: str
    file: str

    @property
    def name(self) -> str:
        return f"{self.title}-{self.code}-{self.file}"


def cache_root() -> Path:
    """KILN_CACHE, else XDG_CACHE_HOME/kiln, else ~/.cache/kiln; it need not exist."""
    if own := os.environ.get("KILN_CACHE"):
        return Path(os.path.abspath(own))
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):  # the specification: what is relative is to be ignored
        return Path(home) / "kiln"
    try:
        return Path.home() / ".cache" / "kiln"
    except RuntimeError as e:
        raise KilnError("there is no home folder to keep compiled code in; name a folder in KILN_CACHE") from e


def wanted(path: Path, options: CodeOptions) -> Wanted | None:
    """The entry for a model file; None where the file is not sound, which `read_plan` tells in full."""
    gguf = open_gguf(path)
    problems: list[str] = []
    config = read_config(gguf, problems)
    if config is None or tensor_problems(config, gguf, problems) is None or problems:
        return None
    shapes = config.to_dict() | {"name": ""}
    weights = [asdict(p) for p in plan_weights(config, gguf)]
    code = _key({"config": shapes, "weights": weights, "options": asdict(options), "made by": _maker()})
    derived = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in derived_constants(config, gguf).items()}
    file = _key(
        {
            "metadata": _metadata_key(gguf),
            "derived": derived,
            "unused": sorted(set(gguf.tensors) - {s for w in weights for s in w["sources"]}),
        }
    )
    title = re.sub(r"[^A-Za-z0-9.]+", "-", config.name).strip("-.") or "model"
    return Wanted(f"{short(title, 60)}-{options.target}", code, file)


def _key(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:KEY]


def _metadata_key(gguf: GGUFFile) -> str:
    """Of everything but what describes a file: its name, its author, its licence."""
    digest = hashlib.sha256()
    for key in sorted(gguf.metadata):
        if not key.startswith(("general.", "split.", "quantize.")):
            number, encoding = gguf.metadata.raw(key)
            digest.update(f"{key} {number} {len(encoding)} ".encode() + encoding)
    return digest.hexdigest()


@functools.cache
def _maker() -> str:
    """What compiles: the versions of the compiler and every file of this Kiln that has a part in it."""
    digest = hashlib.sha256()
    for package in ("torch", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}\n".encode())
    root = Path(__file__).parents[1]
    for file in sorted(f for room in ROOMS for f in (root / room).rglob("*") if f.suffix in (".py", ".toml", ".cpp", ".def")):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def find(entry: Wanted) -> Path | None:
    """The entry, where it is there."""
    path = cache_root() / entry.name
    return path if (path / MANIFEST).is_file() else _same(f"*-{entry.code}-{entry.file}")


def find_code(entry: Wanted) -> Path | None:
    """An entry with the same code, made for a file that differs in something else."""
    return _same(f"*-{entry.code}-*")


def _same(pattern: str) -> Path | None:
    return next((p for p in sorted(cache_root().glob(pattern)) if (p / MANIFEST).is_file()), None)


@contextlib.contextmanager
def making(entry: Wanted) -> Iterator[Path]:
    """The place of an entry that is to be made, for one process at a time; others wait. What dead ones left is removed."""
    root = cache_root()
    lock: list[int] = []

    def unlock() -> None:
        while lock:
            with contextlib.suppress(OSError):
                (root / f".{entry.code}.lock").unlink()  # while it is held: who waits for it sees that it is gone
            os.close(lock.pop())

    with undoing(unlock):
        try:
            root.mkdir(parents=True, exist_ok=True)
            sweep(root, ".*.partial")
            lock.append(_locked(root / f".{entry.code}.lock"))
        except OSError as e:
            raise KilnError(f"{root}: compiled code cannot be kept there: {e.strerror}; name another folder in KILN_CACHE") from e
        yield root / entry.name


def _locked(path: Path) -> int:
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                say("another process is compiling this model's code; waiting for it")
                told = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: an entry is put into its place whole in any case
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # its holder has finished, and removed it
            pass
        os.close(descriptor)


def entries() -> list[tuple[Path, dict]]:
    """Every entry and its manifest, oldest first. What is in the folder and no entry of this format is left alone."""
    found = []
    for path in cache_root().glob("*"):
        if re.fullmatch(rf".+-[0-9a-f]{{{KEY}}}-[0-9a-f]{{{KEY}}}", path.name) and path.is_dir() and not path.is_symlink():
            try:
                manifest = read_manifest(path)
            except KilnError:
                manifest = {}  # of another version
            found.append((path, manifest))
    return sorted(found, key=lambda item: item[0].stat().st_mtime)


def size(path: Path) -> int:
    """Bytes of an entry's files; those that entries share count in each."""
    return sum(f.lstat().st_size for f in path.iterdir())


def clear(names: tuple[str, ...] = ()) -> tuple[int, int]:
    """Removes the named entries, or all; how many and their bytes. KilnError for a name that is none."""
    there = {path.name: path for path, _ in entries()}
    if unknown := [name for name in names if name not in there]:
        raise KilnError(f"{unknown[0]} is not in {cache_root()}; kiln cache list names what is")
    removed, total = 0, 0
    for path in [there[name] for name in dict.fromkeys(names)] if names else there.values():
        total += size(path)
        (path / MANIFEST).unlink(missing_ok=True)  # first: without it a folder is no entry
        shutil.rmtree(path)
        removed += 1
    if not names and cache_root().is_dir():
        sweep(cache_root(), ".*.partial")
        for lock in cache_root().glob(".*.lock"):  # of a process that was killed
            with contextlib.suppress(OSError), lock.open() as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()
    return removed, total
