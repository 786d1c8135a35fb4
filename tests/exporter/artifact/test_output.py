"""What --out may be, what --force replaces, and how a finished artifact gets to its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kiln.exporter import temporary
from kiln.exporter.artifact import output
from kiln.exporter.artifact.output import check_output, check_space, staged
from kiln.exporter.errors import KilnError

ROOT = Path(__file__).parents[3]
ODD = ["my art", "it's", 'a "b"', "ärt 窯", "-art", "a$(touch x);&|*?[b]", "n" * 200, "n" * 255, "窯" * 85, "new\nline"]
ODD += ["x" * 180 + "é" * 30]


def artifact(path: Path, mark: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"format": "kiln", "format_version": 1}))
    (path / "mark").write_text(mark)
    return path


def export(out: Path, force: bool = False, meanwhile=lambda: None) -> None:
    with staged(check_output(out, force)) as stage:
        (stage / "manifest.json").write_text(json.dumps({"format": "kiln"}))
        (stage / "mark").write_text("new")
        meanwhile()


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def refused(out: Path | str, match: str, force: bool = True, sources: tuple[Path, ...] = ()) -> None:
    with pytest.raises(KilnError, match=match) as e:
        check_output(Path(out), force, sources)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_any_name(tmp_path, name):
    export(tmp_path / name)
    assert tree(tmp_path) == {name, f"{name}/manifest.json", f"{name}/mark"}
    export(tmp_path / name, force=True)
    assert tree(tmp_path) == {name, f"{name}/manifest.json", f"{name}/mark"}


def test_a_name_that_is_too_long(tmp_path):
    for path in (tmp_path / ("n" * 256), tmp_path / ("n" * 256) / "art", tmp_path / ("窯" * 86)):
        refused(path, "File name too long")


def test_parents_are_made_and_taken_back(tmp_path):
    export(tmp_path / "a" / "b" / "art")
    assert (tmp_path / "a" / "b" / "art" / "mark").read_text() == "new"
    with pytest.raises(ValueError), staged(check_output(tmp_path / "c" / "d" / "art")):
        raise ValueError
    assert tree(tmp_path) == {"a", "a/b", "a/b/art", "a/b/art/manifest.json", "a/b/art/mark"}


def test_only_an_artifact_or_an_empty_folder_is_replaced(tmp_path):
    mine = tmp_path / "models"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    refused(mine, "exists and is not empty", force=False)
    refused(mine, "is not an artifact of Kiln")
    for text in ('{"name": "web app", "format": "esm"}', "[1]", "kiln", '{"format": "kiln"'):
        (mine / "manifest.json").write_text(text)
        refused(mine, "is not an artifact of Kiln")
    assert (mine / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "is a file; name a folder")
    refused(tmp_path / "file" / "art", "is no folder")
    (tmp_path / "empty").mkdir()
    for force in (False, True):
        export(tmp_path / "empty", force)
        assert (tmp_path / "empty" / "mark").read_text() == "new"
        for entry in (tmp_path / "empty").iterdir():
            entry.unlink()
    art = artifact(tmp_path / "art")
    refused(art, "--force replaces artifacts only", force=False)
    export(art, force=True)
    assert (art / "mark").read_text() == "new" and tree(tmp_path) & {".art"} == set()


def test_an_artifact_that_holds_something_else(tmp_path):
    for name, make in (("models", Path.mkdir), ("model.gguf", Path.touch), ("link", lambda p: p.symlink_to("/"))):
        art = artifact(tmp_path / f"art-{name}")
        make(art / name)
        refused(art, f"holds {name}, which is no part of an artifact")


def test_folders_that_are_never_replaced(tmp_path, monkeypatch):
    art = artifact(tmp_path / "art")
    gguf = tmp_path / "art" / "deep" / "m.gguf"
    refused(art, "m.gguf, which would be deleted", sources=(gguf,))
    (tmp_path / "link").symlink_to(art)
    refused(tmp_path / "link", f"is a link, and --force replaces no link's target; name {art} itself")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "dangling", "is a link to .*nothing, which is no folder")
    refused("/", "a home folder or the root")
    refused(Path.home(), "a home folder or the root")
    monkeypatch.setenv("HOME", str(art))
    refused(art, "a home folder or the root")
    monkeypatch.delenv("HOME")
    for here, names in ((art, (".", art, "../art")), (tmp_path, (".", ".."))):
        monkeypatch.chdir(here)
        for name in names:
            refused(name, "holds the current directory|exists|not an artifact|home folder")
    assert (art / "mark").read_text() == "old"


def test_a_mount_point(tmp_path, monkeypatch):
    """A container's volume: filled in place while it is empty, a file system's lost+found aside; never replaced."""
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    monkeypatch.setattr(Path, "rename", renaming_within(volume, Path.rename))
    before = volume.stat().st_ino
    export(volume)
    assert volume.stat().st_ino == before and tree(volume) == {"lost+found", "manifest.json", "mark"}
    for force in (False, True):
        refused(volume, "is a mount point and not empty, and cannot be replaced; empty it, or name a folder inside it", force)


def renaming_within(volume: Path, rename):
    def checked(self: Path, target: Path):
        if self == volume or target == volume or (volume in self.parents) != (volume in Path(target).parents):
            raise OSError(16, "Device or resource busy")
        assert not (volume / "manifest.json").exists(), "the manifest is not the last"
        return rename(self, target)

    return checked


@pytest.mark.parametrize("mount", ["-t tmpfs none", "--bind other"])
def test_a_real_mount_point(tmp_path, mount):
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.exporter.artifact.test_output import export
export(Path(sys.argv[1]))
"""
    volume = tmp_path / "a volume"
    volume.mkdir()
    (tmp_path / "other").mkdir()
    python = f'exec {sys.executable} -c "$SCRIPT" "$0"'
    command = ["unshare", "-rm", "sh", "-c", f'mount {mount} "$0" && ({python}) && ls -A "$0"', str(volume)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SCRIPT": script}, cwd=tmp_path)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no mounts here: {result.stderr.strip()}")
    assert result.returncode == 0 and result.stdout == "manifest.json\nmark\n", result.stderr


def test_the_current_directory_and_a_link_are_filled_in_place(tmp_path, monkeypatch):
    for name in ("here", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    export(Path("."))
    assert tree(Path(".")) == {"manifest.json", "mark"}
    export(tmp_path / "link")
    assert tree(tmp_path / "target") == {"manifest.json", "mark"} and (tmp_path / "link").is_symlink()


def test_what_appears_meanwhile_is_kept(tmp_path):
    def appear():
        (tmp_path / "art").mkdir()
        (tmp_path / "art" / "theirs").touch()

    for force in (False, True):
        with pytest.raises(KilnError, match="made by something else"):
            export(tmp_path / "art", force, appear)
        assert tree(tmp_path) == {"art", "art/theirs"}
        (tmp_path / "art" / "theirs").unlink()
        (tmp_path / "art").rmdir()
    with pytest.raises(KilnError, match="made by something else"):
        export(tmp_path / "art", meanwhile=(tmp_path / "art").touch)
    assert tree(tmp_path) == {"art"}


def test_an_artifact_that_changes_meanwhile_is_kept(tmp_path):
    art = artifact(tmp_path / "art")

    def replaced():
        art.rename(tmp_path / "elsewhere")
        artifact(art, "theirs")

    with pytest.raises(KilnError, match="changed by something else"):
        export(art, True, replaced)
    assert (art / "mark").read_text() == "theirs"
    with pytest.raises(KilnError, match="holds notes"):
        export(art, True, (art / "notes").mkdir)
    assert (art / "mark").read_text() == "theirs"
    here = tmp_path / "empty"
    here.mkdir()
    with pytest.raises(KilnError, match="made by something else"):
        export(here, meanwhile=(here / "theirs").touch)
    assert tree(here) == {"theirs"}


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_one_is_there_until_the_new_one_is(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    art = artifact(tmp_path / "art")
    export(art, force=True, meanwhile=lambda: (art / "mark").read_text() == "old" or pytest.fail("gone early"))
    assert (art / "mark").read_text() == "new" and tree(tmp_path) == {"art", "art/manifest.json", "art/mark"}
    with pytest.raises(ValueError):
        export(art, force=True, meanwhile=lambda: int("x"))
    assert (art / "mark").read_text() == "new" and tree(tmp_path) == {"art", "art/manifest.json", "art/mark"}


def test_an_artifact_set_aside_by_a_dead_export_comes_back(tmp_path):
    """Killed between two renames, where the file system cannot exchange."""
    art = artifact(tmp_path / "art")
    dead = dead_folder(tmp_path, ".art.{pid}.partial")
    art.rename(dead / "old")
    refused(art, "exists and is not empty", force=False)
    assert (art / "mark").read_text() == "old"
    with pytest.raises(ValueError):
        export(art, force=True, meanwhile=lambda: int("x"))
    assert (art / "mark").read_text() == "old" and tree(tmp_path) == {"art", "art/manifest.json", "art/mark"}


def dead_folder(parent: Path, name: str) -> Path:
    """What a process leaves that was killed while it had a folder; `{pid}` in its name is that process."""
    script = f"""
import os, signal
from pathlib import Path
from kiln.exporter.temporary import owned
with owned(Path({str(parent)!r}) / {name!r}.format(pid=os.getpid())) as folder:
    (folder / "weights").write_text("17 GB")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == -signal.SIGKILL and result.stdout, result.stderr
    return Path(result.stdout.strip())


def test_stale_folders_are_removed_and_nothing_else(tmp_path):
    dead = dead_folder(tmp_path, ".art.{pid}.partial")
    assert (dead / "weights").exists()
    kept = [tmp_path / ".art.1.partial", tmp_path / ".art.999999.partial", tmp_path / ".other.1.partial"]
    for folder in kept:
        folder.mkdir()
        (folder / "mine").touch()
    (kept[0] / temporary.OWNER).write_text(json.dumps({"what": "something else", "pid": 999999, "started": 1, "host": "x"}))
    other = dead_folder(tmp_path, ".another.{pid}.partial")
    with temporary.owned(tmp_path / ".art.alive.partial") as alive:
        export(tmp_path / "art")
        assert not dead.exists() and alive.exists() and other.exists() and all((f / "mine").exists() for f in kept)


def test_a_process_id_that_was_given_again(tmp_path):
    """The owner's process id is that of another process now: what counts is when it started."""
    dead = dead_folder(tmp_path, ".art.{pid}.partial")
    owner = json.loads((dead / temporary.OWNER).read_text())
    (dead / temporary.OWNER).write_text(json.dumps(owner | {"pid": os.getpid()}))
    assert temporary.stale(dead)
    (dead / temporary.OWNER).write_text(json.dumps(owner | {"pid": os.getpid(), "started": temporary._started(os.getpid())}))
    assert not temporary.stale(dead)


def test_another_container(tmp_path):
    """Its process ids say nothing here; the lock does."""
    with temporary.owned(tmp_path / "a") as folder:
        owner = json.loads((folder / temporary.OWNER).read_text())
        (folder / temporary.OWNER).write_text(json.dumps(owner | {"host": "another", "pid": 999999}))
        assert not temporary.stale(folder)
        copy = tmp_path / "b"
        copy.mkdir()
        (copy / temporary.OWNER).write_bytes((folder / temporary.OWNER).read_bytes())
        assert temporary.stale(copy)


def test_what_a_dead_export_left_in_a_volume(tmp_path, monkeypatch):
    """It does not count as content, and goes."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dead = dead_folder(tmp_path / "here", ".kiln.{pid}.partial")
    export(Path("."))
    assert tree(Path(".")) == {"manifest.json", "mark"} and not dead.exists()


def test_not_enough_space(tmp_path):
    place = check_output(tmp_path / "art")
    check_space(place, 1)
    with pytest.raises(KilnError, match="1048576.00 GiB are needed, .* GiB are free on that disk; make room"):
        check_space(place, 1 << 50)


def test_a_folder_that_nobody_signed(tmp_path):
    """Killed before it was signed, or after it was emptied: its name tells the process."""
    dead = dead_folder(tmp_path, ".x.{pid}.partial")
    pid = dead.name.split(".")[2]
    for name, content in ((f".art.{pid}.partial", None), (f".art.{pid}1.partial", b""), (f".art.{pid}2.partial", b'{"what": "tem')):
        folder = tmp_path / name
        folder.mkdir()
        if content is not None:
            (folder / temporary.OWNER).write_bytes(content)
        assert temporary.stale(folder)
        (folder / "new").mkdir()
        assert not temporary.stale(folder), "it holds something"
        (folder / "new").rmdir()
    alive = tmp_path / f".art.{os.getpid()}.partial"
    alive.mkdir()
    assert not temporary.stale(alive)
    os.utime(alive, (0, 0))
    assert temporary.stale(alive), "a live process signs at once"
    export(tmp_path / "art")
    assert {entry.name for entry in tmp_path.iterdir()} == {dead.name, "art"}
