"""What `kiln export` refuses before it imports torch: one clear line, with --dry-run too, and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kiln.exporter.cli import main
from kiln.exporter.compiler import host
from kiln.exporter.compiler.host import check_compiler, compile_failure
from tests.timeline import FIXTURES

ROOT = Path(__file__).parents[2]
TINY = FIXTURES / "gemma4-tiny-dense.gguf"


@pytest.fixture()
def refuses(tmp_path):
    """Runs export with a torch that nobody may import."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "torch.py").write_text("import os; print('torch was imported', flush=True); os._exit(99)")
    (tmp_path / "tmp").mkdir()

    new = tmp_path / "new" / "art"

    def run(*options: object, match: str, out: object = new, gguf: object = TINY, env=(), cwd: Path = tmp_path) -> None:
        environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"} | dict(env)
        before = sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
        command = [sys.executable, "-m", "exporter", "export", "--gguf", gguf, "--out", out, "--target", "cpu", *options]
        for dry in ((), ("--dry-run",)):
            result = subprocess.run([*map(str, command), *dry], capture_output=True, text=True, env=environment, cwd=cwd, timeout=60)
            assert result.returncode == 1 and not result.stdout, result
            assert len(result.stderr.splitlines()) == 1 and match in result.stderr, result.stderr
        assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before

    return run


def test_the_model_file(refuses, tmp_path):
    refuses(gguf=tmp_path / "none.gguf", match="none.gguf")
    refuses(gguf=tmp_path, match=str(tmp_path))
    os.mkfifo(tmp_path / "pipe.gguf")
    refuses(gguf=tmp_path / "pipe.gguf", match="pipe.gguf")


def test_out(refuses, tmp_path):
    mine = tmp_path / "models"
    mine.mkdir()
    shutil.copy(TINY, mine / "m.gguf")
    refuses("--force", gguf=mine / "m.gguf", out=mine, match="m.gguf, which would be deleted")
    refuses("--force", gguf="m.gguf", out=".", cwd=mine, match="holds the current directory")
    refuses("--force", out=mine, match="is not an artifact of Kiln")
    refuses(out=mine, match="exists and is not empty")
    refuses("--force", gguf="../models/m.gguf", out="..", cwd=mine, match="holds the current directory")
    refuses("--force", out="/", match="home folder or the root")
    refuses(out=TINY, match="is a file; name a folder")


def test_the_other_paths(refuses, tmp_path):
    refuses("--chat-template", tmp_path / "none.jinja", match="none.jinja")
    refuses("--chat-template", tmp_path, match=str(tmp_path))
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    refuses("--chat-template", tmp_path / "latin.jinja", match="latin.jinja")
    refuses("--dump-passes", TINY, match="is no folder; name another")
    for dumps in ("new/art", "new/art/dumps", "new/../new/art/a/b"):
        refuses("--dump-passes", dumps, match="which holds an artifact and nothing else; name another")


def test_the_folder_for_temporary_files(refuses, tmp_path):
    refuses(env={"TMPDIR": str(tmp_path / "none")}, match="none is no folder; set TMPDIR to a folder that can be written")
    refuses(env={"KILN_TMPDIR": "/proc"}, match="set TMPDIR to")


def test_the_compiler(refuses, tmp_path):
    refuses(env={"CXX": "no-such-g++"}, match="CXX=no-such-g++ was not found; install g++")
    refuses(env={"CXX": "ccache g++"}, match="or set CXX to one program without arguments")
    refuses(env={"CXX": "false"}, match="CXX=false cannot compile with OpenMP for x86-64-v3: it says nothing")
    tools = tmp_path / "bin"
    tools.mkdir()
    refuses(env={"PATH": str(tools)}, match="the C++ compiler g++ was not found; install g++")
    (tools / "g++").write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2; exit 1\n")
    (tools / "g++").chmod(0o755)
    refuses(env={"PATH": str(tools)}, match="cannot compile with OpenMP for x86-64-v3: fatal error: omp.h: No such file")


def test_a_read_only_tmp():
    """/tmp itself, with no TMPDIR: refused with what to do; with a TMPDIR elsewhere nothing is missing."""
    script = f"""
set -e
mount -t tmpfs -o ro none /tmp
cd {ROOT}
! env -u TMPDIR {sys.executable} -m exporter export --gguf {TINY} --out /dev/shm/kiln-art --target cpu --dry-run
export TMPDIR=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$TMPDIR"' EXIT
! {sys.executable} -m exporter export --gguf {TINY} --out /tmp/new/art --target cpu
{sys.executable} -c '
from kiln.exporter.compiler.host import check_compiler
from kiln.exporter.temporary import working_folder
with working_folder() as folder:
    check_compiler(folder)
'
"""
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no mounts here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    first, second = result.stderr.splitlines()
    assert "/tmp: the folder for temporary files cannot be written; set TMPDIR" in first
    assert "--out /tmp/new/art: /tmp cannot be written; name another" in second


def test_an_empty_cxx_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "")
    check_compiler(tmp_path)
    assert os.environ["CXX"] == "g++" and not list(tmp_path.iterdir())


def test_a_compiler_at_any_path(tmp_path, monkeypatch):
    folder = tmp_path / "it's a \"b\""
    folder.mkdir()
    (folder / "g++ 12").symlink_to(shutil.which("g++"))
    monkeypatch.setenv("CXX", str(folder / "g++ 12"))
    check_compiler(folder)


def test_tools_for_gpus(tmp_path, monkeypatch):
    arguments = ["export", "--gguf", str(TINY), "--out", str(tmp_path / "art"), "--target", "sm_90", "--dry-run"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and f"no CUDA headers in {tmp_path}; install the package's dependencies" in result.stderr
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(host.shutil, "which", lambda name: None if name == "objcopy" else f"/usr/bin/{name}")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "objcopy was not found" in result.stderr and "binutils" in result.stderr


def test_a_failed_compilation_is_one_line_and_a_file(tmp_path, monkeypatch):
    from torch._inductor.exc import CppCompileError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output = "In file included from x.cpp:1:\nx.cpp:3:7: error: 'y' was not declared\nx.cpp:4: note: here\n"
    text = compile_failure(CppCompileError(["g++", "x.cpp"], output))
    assert text.startswith("the C++ compiler failed: x.cpp:3:7: error: 'y' was not declared; all it said is in ") and "\n" not in text
    log = Path(text.rpartition(" ")[2])
    assert log.parent == tmp_path and log.read_text() == f"g++ x.cpp\n\n{output}"
    text = compile_failure(subprocess.CalledProcessError(1, ["ld", "-r"], b"ld: cannot open a.o\n"))
    assert "ld: cannot open a.o" in text
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = CppCompileError(["g++"], output)
    assert "the C++ compiler failed: x.cpp:3:7: error" in compile_failure(wrapped)
    assert compile_failure(ValueError("one\ntwo")) == "ValueError: one (KILN_DEBUG=1 shows where)"


def test_no_traceback_for_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    from kiln.exporter import build

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr(build, "write_weights", full)
    result = CliRunner().invoke(main, ["export", "--gguf", str(TINY), "--out", str(tmp_path / "art"), "--target", "cpu"])
    assert result.exit_code == 1 and "kiln: error: tokenizer.json: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_space_for_the_weights_is_looked_for_first(tmp_path, monkeypatch):
    from kiln.exporter import build

    monkeypatch.setattr(build, "weight_bytes", lambda *arguments: 1 << 60)
    command = ["export", "--gguf", str(TINY), "--out", str(tmp_path / "art"), "--target", "cpu"]
    result = CliRunner().invoke(main, [*command, "--weights", "copy"])
    assert result.exit_code == 1 and "GiB are needed" in result.stderr and not list(tmp_path.iterdir())
    result = CliRunner().invoke(main, [*command, "--dry-run"])
    assert result.exit_code == 0 and "GiB are needed" not in result.stderr
    result = CliRunner().invoke(main, [*command, "--weights", "copy", "--dry-run"])
    assert result.exit_code == 0 and "total" in result.stdout and "note: --out" in result.stderr and "GiB are needed" in result.stderr


def test_another_locale(tmp_path):
    """Names and templates are UTF-8 whatever the locale says; standard output writes what it can."""
    template = tmp_path / "vorlage.jinja"
    template.write_text("é{{ messages[0].content }}", encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", "-m", "exporter", "export", "--gguf", TINY, "--out", tmp_path / "窯", "--target", "cpu"]
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    command += ["--chat-template", template, "--dry-run"]
    result = subprocess.run([*map(str, command)], capture_output=True, env=env)
    assert result.returncode == 0, result.stderr
