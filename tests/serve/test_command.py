"""`kiln serve` where it cannot begin: one line that says why, and exit code 1; 2 for usage."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from kiln.exporter.cli import main
from kiln.exporter.errors import KilnError
from kiln.exporter.serve.server import loopback, read_keys


def said(*arguments: object, code: int = 1) -> str:
    result = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_what_cannot_be_served(tmp_path: Path, talking: Path) -> None:
    assert said(tmp_path, "--port", 0).count("\n") == 1 and "is not an artifact" in said(tmp_path, "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen on 127.0.0.1" in said(talking, "--port", taken.getsockname()[1])
    assert "cannot listen on no.such.host.invalid:0" in said(talking, "--host", "no.such.host.invalid", "--port", 0)
    assert "cannot read the API keys" in said(talking, "--api-keys", tmp_path / "none")
    broken = tmp_path / "broken"
    shutil.copytree(talking, broken)
    for text, why in (("{{", "the chat template cannot be used: "), ("", "its text is not in what it writes")):
        (broken / "chat_template.jinja").write_text(text)
        assert why in said(broken, "--port", 0, "--threads", 1)
    (broken / "manifest.json").write_text('{"format": "kiln", "format_version": 2}')
    assert "manifest.json" in (line := said(broken, "--port", 0)) and line.count("\n") == 1
    said(talking, "--sessions", 0, code=2)
    said(talking, "--port", 70_000, code=2)
    said(code=2)


NONE = "holds no API key"


@pytest.mark.parametrize(
    "text, error",
    [
        ("", NONE),
        ("# only this\n\n", NONE),
        ("short\n", ":1: an API key has 8"),
        ("long-enough-key\nwith a space\n", ":2: an API key"),
        ("schlüssel-schlüssel\n", ":1: an API key"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KilnError, match=error):
        read_keys(path)


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\nthe-first-key\n\n  the-second-key \n")
    path.chmod(0o600)
    assert read_keys(path) == (b"the-first-key", b"the-second-key") and not capsys.readouterr().err
    path.chmod(0o644)
    read_keys(path)
    assert "can be read by others" in capsys.readouterr().err


def test_loopback() -> None:
    assert loopback("127.0.0.1") and loopback("::1") and loopback("localhost") and loopback("127.9.9.9")
    assert not loopback("0.0.0.0") and not loopback("192.168.1.1") and not loopback("example.org")
