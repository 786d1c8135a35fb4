"""A picture of `kiln chat` as a terminal shows it: python -m tests.tools.capture_chat ARTIFACT OUT.svg [LINE ...]

Types the lines, each when the answer before it is there. Needs pyte, a terminal in Python. Look at the picture before it goes in.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 100, 30
QUIET, PATIENCE = 4.0, 240.0  # seconds without a character after which an answer is there; at most so long for one
LINES = ["What is the capital of Portugal?", "And which ocean lies before it? One sentence.", "/tokens", "/speed"]


class Terminal(pyte.Screen):
    """A screen that answers what a program asks of its terminal."""

    def __init__(self, write_back) -> None:
        self.write_back = write_back
        super().__init__(COLUMNS, ROWS)

    def write_process_input(self, data: str) -> None:
        self.write_back(data.encode())


def painted(screen: pyte.Screen) -> Text:
    names = {"default": None, "brown": "yellow"}

    def color(name: str) -> str | None:
        found = names.get(name, name)
        return f"#{found}" if found and len(found) == 6 and not found.isalpha() else found

    text, last = Text(), max((y for y in range(ROWS) if screen.display[y].strip()), default=0)
    for y in range(last + 1):
        for x in range(COLUMNS):
            char = screen.buffer[y][x]
            looks = {"bold": char.bold, "italic": char.italics, "underline": char.underscore, "reverse": char.reverse}
            style = [word for word, there in looks.items() if there]
            text.append(char.data, " ".join(filter(None, [*style, color(char.fg)])))
        text.append("\n")
    return text


def main(artifact: str, out: Path, lines: list[str]) -> None:
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvp(sys.executable, [sys.executable, "-m", "exporter", "chat", artifact, "--temperature", "0", "--max-new-tokens", "80"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen = Terminal(lambda data: os.write(terminal, data))
    stream = pyte.ByteStream(screen)

    def settle() -> None:
        end, quiet = time.monotonic() + PATIENCE, time.monotonic() + QUIET
        while time.monotonic() < min(end, quiet):
            if select.select([terminal], [], [], 0.2)[0]:
                stream.feed(os.read(terminal, 1 << 16))
                quiet = time.monotonic() + QUIET

    settle()
    for line in lines:
        os.write(terminal, f"{line}\r".encode())
        settle()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(painted(screen))
    picture = console.export_svg(title=f"kiln chat {Path(artifact).name}", unique_id="chat")
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # fonts of another site
    os.write(terminal, b"/quit\r\x04")
    os.close(terminal)
    print("\n".join(line.rstrip() for line in screen.display if line.strip()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or LINES)
