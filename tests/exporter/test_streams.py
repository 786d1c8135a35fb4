"""Standard streams that are closed or take nothing, and options that no file makes right: one line, 1 or 2, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kiln.exporter.cli import main
from tests.timeline import FIXTURES

ROOT = Path(__file__).parents[2]


def shell(redirected: str, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command with its streams as a shell sets them."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "exporter", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("export", "--help")])
def test_output_that_takes_nothing(arguments: tuple[str, ...]) -> None:
    for redirected, why in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        assert shell(redirected, *arguments) == (1, f"kiln: error: {why}\n"), redirected
    assert shell("2>&-", *arguments) == (0, "")


def test_no_file_becomes_a_stream(tmp_path: Path) -> None:
    """What is printed lands in no file that was opened where a closed stream had been."""
    out = tmp_path / "r"
    code = f"""
import runpy, sys
def command():
    with open({str(out)!r}, "w") as file:
        assert file.fileno() > 2 and sys.stdin.read() == ""
        print("told", file=sys.stderr)
import types
sys.modules["kiln.exporter.cli"] = types.SimpleNamespace(main=command)
runpy.run_module("exporter", run_name="__main__")
"""
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=ROOT, timeout=100)
    assert done.returncode == 0 and out.read_text() == ""


def test_chat_without_input(talking: Path) -> None:
    assert shell("<&-", "chat", talking, "--threads", 1) == (0, "")
    code, said = shell(">&-", "run", talking, "--prompt", "a", "--system", "b", "--max-new-tokens", 1, "--threads", 1)
    assert code == 1 and said == "kiln: error: Bad file descriptor\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("serve", FIXTURES, f"--{name}", value) for name in ("timeout", "drain", "max-gap-ms") for value in ("nan", "inf", "-inf")),
        *(("serve", FIXTURES, f"--snapshot-{where}-gib", value) for where in ("host", "device") for value in ("inf", "1e30", "nan")),
        *((command, FIXTURES, "--device", name) for command in ("serve", "chat", "bench") for name in ("gpu", "cuda:", "cuda:x", "")),
        ("serve", FIXTURES, "--alias", ""),
        *(("serve", FIXTURES, "--cors-origins", name) for name in ("example.org", "https://example.org/", "", "https://")),
        *(("serve", FIXTURES, "--allow-host", name) for name in ("example.org:80", "http://example.org", "[::1]", "")),
        ("chat", FIXTURES, "--temperature", "nan"),
        ("chat", FIXTURES, "--top-p", "nan"),
        ("bench-serve", "http://127.0.0.1:1", "--timeout", "inf"),
        ("bench", FIXTURES, "--depths", "x"),
        ("bench", FIXTURES, "--rows", "x"),
        ("eval", FIXTURES, "--suite", "speed"),
        ("eval", FIXTURES, "--suite", "ppl"),
        ("eval", FIXTURES, "--suite", "ppl", "--text", os.devnull, "--plot", "x.png"),
    ],
)
def test_usage(arguments: tuple[object, ...]) -> None:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 2 and "rror: " in result.output.splitlines()[-1], (arguments, result.output, result.exception)
