"""Paths as users have them: spaces, quotes, apostrophes, other alphabets, leading dashes, long names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kiln.exporter.measure.runner import runner
from kiln.exporter.tools.synth import write_synthetic
from tests.conftest import kiln
from tests.timeline import FIXTURES

ROOT = Path(__file__).parents[2]
TINY = FIXTURES / "gemma4-tiny-dense.gguf"
ODD = "-it's an, \"odd\" (ö) 窯 $HOME; = &"


@pytest.fixture()
def odd(tmp_path) -> Path:
    """A folder with a name to trip over, and in it a checkout, the packages of a virtual environment, a compiler and a TMPDIR."""
    folder = tmp_path / ODD
    folder.mkdir()
    for name in ("exporter", "passes", "custom_ops", "configs", "runtime_cpp"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "packages").symlink_to(Path(torch.__file__).parents[1])
    (folder / "g++ of mine").symlink_to(shutil.which("g++"))
    (folder / "tmp").mkdir()
    return folder


@pytest.mark.nightly  # by day test_export_cuda compiles in a folder of such a name
def test_an_export_among_odd_paths(odd):
    """The compiler's commands are strings: every path that goes into them is quoted. Nothing but the artifact stays.

    Where mounts can be made, programs cannot be executed in TMPDIR.
    """
    out = odd / ("-" + "n" * 199)
    environment = os.environ | {
        "PYTHONPATH": ":".join(str(odd / name) for name in ("checkout", "checkout/runtime_cpp/python", "packages")),
        "CXX": str(odd / "g++ of mine"),
        "TMPDIR": str(odd / "tmp"),
    }
    code = "import torch, exporter; print(torch.__file__, exporter.__file__, sep='\\n')"
    where = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=odd).stdout.splitlines()
    assert len(where) == 2 and all(str(odd) in path for path in where)
    write_synthetic(odd / "m.gguf", "tiny", "q4_k_m", 0, layers=2)
    command = [sys.executable, "-m", "exporter", "export", "--gguf", "m.gguf", "--out", out.name, "--target", "cpu", "--max-seq-len", "64"]
    before = {p.name for p in odd.iterdir()}
    script = '"$@"; code=$?; ls -A "$TMPDIR"; exit $code'
    shell = ["sh", "-c", script, "sh"]
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", odd / "tmp"], capture_output=True).returncode == 0:
        shell = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o noexec none "$TMPDIR" && {{ {script}; }}', "sh"]
    result = subprocess.run([*shell, *map(str, command)], capture_output=True, text=True, env=environment, cwd=odd)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("total "), f"left in TMPDIR: {result.stdout}"
    assert {p.name for p in odd.iterdir()} == before | {out.name} and not list((odd / "tmp").iterdir())
    assert ODD.encode() not in (out / "model.pt2").read_bytes()
    kiln("inspect", "--verify", out)
    play = [runner(), out, "--tokens", "2,3", "--max-new-tokens", "2", "--no-eog", "--json"]
    answer = subprocess.run(play, capture_output=True, text=True)
    assert answer.returncode == 0 and len(json.loads(answer.stdout)["tokens"]) == 2, answer.stderr


@pytest.mark.nightly
def test_a_compiler_that_fails_later(tmp_path):
    """One line with its reason, and the file with all it said; nothing else stays."""
    compiler, temporary = tmp_path / "g++", tmp_path / "tmp"
    works = 'case "$*" in *trial.cpp*|*--version*) exec g++ "$@";; esac'
    compiler.write_text(f'#!/bin/sh\n{works}\necho "x.cpp:3: error: too old" >&2\nexit 1\n')
    compiler.chmod(0o755)
    temporary.mkdir()
    environment = os.environ | {"CXX": str(compiler), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "exporter", "export", "--gguf", TINY, "--out", tmp_path / "art", "--target", "cpu"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and line.startswith("kiln: error: compiling "), result.stderr
    assert "for cpu: the C++ compiler failed: x.cpp:3: error: too old; all it said is in " in line
    logs = list(temporary.iterdir())
    assert Path(line.rpartition(" is in ")[2]) in logs and all(log.suffix == ".log" for log in logs)
    assert "too old" in logs[0].read_text() and str(compiler) in logs[0].read_text()
    assert not (tmp_path / "art").exists()


CMAKE = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$LOG"
"""
PIP = """import os, sys
from pathlib import Path
print(*sys.argv[1:], sep="\\n", file=open(os.environ["LOG"], "a"))
if "--wheel-dir" in sys.argv:
    folder = Path(sys.argv[sys.argv.index("--wheel-dir") + 1])
    folder.mkdir()
    (folder / "kiln_runtime-0-any.whl").touch()
"""


def test_make_passes_paths_whole(tmp_path):
    """Folders with odd names reach cmake (with somebody's Python) and pip (with our own environment) as one argument each."""
    folder, log = tmp_path / "it's my $HOME (ö)" / "checkout", tmp_path / "log"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    venv = folder.parent / "my venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / "bin" / "cmake").write_text(CMAKE)
    (venv / "bin" / "cmake").chmod(0o755)
    site = venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(PIP)
    (folder / "pyproject.toml").touch()
    os.utime(folder / "pyproject.toml", (0, 0))
    (venv / ".installed").touch()
    of_make = {"PY", "VENV", "BUILD", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}  # the tests may run under make
    environment = {k: v for k, v in os.environ.items() if k not in of_make} | {"LOG": str(log)}
    for arguments, expected in (
        ([f"PY={escaped(venv)}/bin/python"], [f"-DCMAKE_INSTALL_PREFIX={site}", f"-DPython_EXECUTABLE={venv}/bin/python"]),
        (
            [f"VENV={escaped(venv)}", f"BUILD={escaped(folder.parent)}/a {{b}}"],
            [f"--config-settings=build-dir={folder.parent}/a {{{{b}}}}/cpp", f"{folder.parent}/a {{b}}/wheels/kiln_runtime-0-any.whl"],
        ),
    ):
        log.unlink(missing_ok=True)
        result = subprocess.run(["make", "build", *arguments], capture_output=True, text=True, cwd=folder, env=environment)
        assert result.returncode == 0, result.stderr + result.stdout
        words = log.read_text().splitlines()
        assert not [word for word in expected if word not in words], words
    (folder.parent / 'a"b').mkdir()
    command = ["make", "build", f"PY={escaped(venv)}/bin/python", 'BUILD=../a"b']
    result = subprocess.run(command, capture_output=True, cwd=folder, env=environment)
    assert result.returncode == 2 and b"a double quote or a semicolon; move the checkout" in result.stderr


def test_workers_of_the_gpu_tests_are_counted():
    """Before make 4.4 its own shell does not see what it exports: what asks Python stands in the recipe."""
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}  # below make it names its folder last
    (recipe,) = subprocess.run(["make", "-n", "test-gpu", f"PY={sys.executable}", "WORKERS=7"], capture_output=True, text=True, cwd=ROOT,
                               env=outside).stdout.splitlines()[-1:]  # fmt: skip
    shown = subprocess.run(["sh", "-c", recipe.replace('"$PY" -m pytest', "echo", 1)], capture_output=True, text=True,
                           env=os.environ | {"PY": sys.executable}).stdout  # fmt: skip
    assert shown.startswith("-m gpu -n 7 "), shown


def test_cmake_finds_its_parts_below_odd_paths(tmp_path):
    packages = tmp_path / "it's my $HOME (ö)" / "packages"
    packages.parent.mkdir()
    packages.symlink_to(Path(torch.__file__).parents[1])
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": str(packages), "PATH": f"{scripts}:{os.environ['PATH']}"}
    command = ["cmake", "-S", ROOT / "runtime_cpp", "-B", packages.parent / "b", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def escaped(path: Path) -> str:
    """As a user writes it on make's command line, where $ begins a variable."""
    return str(path).replace("$", "$$")
