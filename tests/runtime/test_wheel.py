"""The wheel of kiln-runtime, as `make build` made it: alone in a fresh environment it plays; kiln-export comes and goes beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import kiln
from tests.runtime.toy import PROMPT, eager, ids

pytestmark = pytest.mark.builds  # what is played here has no sanitizer
ROOT = Path(__file__).parents[2]
BUILD = ROOT / os.environ.get("BUILD", "build")
MOST = 30 << 20  # bytes of an installation


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = sorted((BUILD / "wheels").glob("kiln_runtime-*.whl"))
    if not found:
        pytest.skip(f"no wheel in {BUILD / 'wheels'}: with PY=... the runner is installed by CMake; see make wheels")
    return found[0]


class Environment:
    """A virtual environment with nothing in it, and nothing around it."""

    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        self.site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        self.around = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=self.bin, env=self.around)
        assert not check or not done.returncode, done.stderr
        return done

    def python(self, code: str) -> str:
        return self.run(self.bin / "python", "-c", code).stdout

    def pip(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert not done.returncode, done.stderr

    def files(self) -> set[str]:
        every = (p for folder in (self.site, self.bin) for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(self.bin.parent)) for p in every if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("fresh") / "it's new")
    environment.pip("install", "--no-index", wheel)
    return environment


def test_it_plays_alone(fresh: Environment, toy: Path, device: str) -> None:
    """Without torch, numpy, a compiler or anything of the build: kiln-run and the module play a compiled model."""
    size = sum(path.stat().st_size for path in fresh.site.rglob("*") if path.is_file())
    assert size < MOST, f"{size / 1e6:.1f} MB"
    play = [fresh.bin / "kiln-run", toy, "--device", device, "--tokens", ids(PROMPT), "--max-new-tokens", "6", "--no-eog", "--json"]
    tokens = json.loads(fresh.run(*play).stdout)["tokens"]
    assert tokens == eager(PROMPT, 6)[0]
    code = f"""
import json, sys
import kiln
assert not any(name in sys.modules for name in ("kiln._runtime", "numpy"))
session = kiln.Session(kiln.Model({str(toy)!r}, {device!r}))
session.prefill({PROMPT})
tokens = session.generate(6, stop_at_eog=False)[0]
try:
    session.logits()
    said = "logits"
except ImportError as e:
    said = str(e)
libraries = {{line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "libgomp" in line}}
print(json.dumps([tokens, said, sorted(libraries), sorted(name for name in sys.modules if name.split(".")[0] == "kiln")]))
"""
    found, said, libraries, loaded = json.loads(fresh.python(code))
    assert found == tokens and "pip install kiln-runtime[numpy]" in said
    assert loaded == ["kiln", "kiln._runtime"]
    assert libraries == [str(fresh.site / "kiln/lib/libgomp.so.1")]  # the compiled model, which asks for it by name, gets the wheel's


def test_kiln_run_is_the_binary(fresh: Environment) -> None:
    """The command becomes the binary: signals that Python ignores are not ignored, exit codes and messages are its own."""
    (binary,) = fresh.site.glob("kiln/bin/kiln-run")
    for arguments in (["--help"], [], ["--no-such-option"], ["/nowhere", "--tokens", "1"]):
        ours, theirs = (fresh.run(command, *arguments, check=False) for command in (fresh.bin / "kiln-run", binary))
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    codes = []
    for command in (fresh.bin / "kiln-run", binary):
        reader, writer = os.pipe()
        os.close(reader)
        codes.append(subprocess.run([command, "--help"], stdout=writer, stderr=subprocess.PIPE, env=fresh.around).returncode)
        os.close(writer)
    assert codes[0] == codes[1] != 0
    (binary.parent / "kiln-run").rename(binary.parent / "away")
    missing = fresh.run(fresh.bin / "kiln-run", check=False)
    (binary.parent / "away").rename(binary)
    assert missing.returncode == 1 and missing.stderr.startswith("kiln-run: error: ") and missing.stderr.count("\n") == 1


def test_each_goes_without_the_other(wheel: Path, tmp_path: Path) -> None:
    """kiln/__init__.py is kiln-runtime's alone; no file is of both, and taking one away leaves the other whole."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (export,) = tmp_path.glob("kiln_export-*-py3-none-any.whl")
    environment = Environment(tmp_path / "v")
    empty = environment.files()
    environment.pip("install", "--no-index", wheel)
    runtime = environment.files()
    environment.pip("install", "--no-index", "--no-deps", export)
    both = environment.files()
    assert runtime < both and not any(name.endswith("site-packages/kiln/__init__.py") for name in both - runtime)
    environment.pip("uninstall", "--yes", "kiln-export")
    assert environment.files() == runtime and "class" in environment.python("import kiln; print(kiln.Model)")
    environment.pip("install", "--no-index", "--no-deps", export)
    environment.pip("uninstall", "--yes", "kiln-runtime")
    assert environment.files() == both - (runtime - empty)


def test_one_version() -> None:
    """CMakeLists.txt has it: the module, the C library and both distributions follow, and kiln-export asks for the runtime of its own."""
    (version,) = re.findall(r"^project\(kiln_runtime VERSION ([0-9.]+)", (ROOT / "runtime_cpp/CMakeLists.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kiln.__version__.split()[0] == version and f"kiln-runtime=={version}" in project["dependencies"]
    assert "version" in project["dynamic"]


def test_the_tarball(tmp_path: Path, wheel: Path) -> None:
    """`make tarball`: kiln-run, the library, headers, examples and every licence; it runs where it is unpacked."""
    command = ["make", "--no-print-directory", "tarball", f"BUILD={BUILD}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert not made.returncode, made.stderr
    (path,) = (BUILD / "dist").glob("kiln-runtime-*-linux-x86_64.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    wanted = ["bin/kiln-run", "lib/libkiln.so", "lib/libgomp.so.1", "include/kiln.h", "lib/cmake/kiln/kilnConfig.cmake", "examples/play.c"]
    licences = ["LICENSE", "NOTICE", "licenses/GPL-3.0.txt", "licenses/GCC-exception-3.1.txt", "licenses/pybind11.txt"]
    assert {*wanted, *licences} <= there
    assert not [p for p in folder.rglob("*") if p.is_symlink()] and not any(name.endswith(".py") for name in there)
    needed = subprocess.run(["ldd", folder / "bin" / "kiln-run"], capture_output=True, text=True, check=True).stdout
    assert str(folder / "bin/../lib/libgomp.so.1") in needed or str(folder / "lib/libgomp.so.1") in needed
    assert subprocess.run([folder / "bin/kiln-run", "--help"], capture_output=True, text=True, env={}).stdout.startswith("usage: kiln-run")
