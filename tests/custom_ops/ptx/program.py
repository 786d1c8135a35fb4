"""A kernel's PTX as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str
    negated: bool
    parts: tuple[str, ...]  # of the opcode
    operands: tuple[Any, ...]  # texts, tuples of texts where they stand in braces

    @property
    def base(self) -> str:
        return self.parts[0]


def _operands(text: str) -> tuple[Any, ...]:
    found = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        found.append(tuple(re.findall(r"[^,\s{}]+", part)) if part[0] == "{" else part)
    return tuple(found)


@dataclass
class Program:
    """A kernel's instructions, its labels, and the sizes of its registers in bytes, a predicate's 0."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # bytes of each variable of its own

    @classmethod
    def parse(cls, text: str) -> Program:
        text = re.sub(r"//[^\n]*", "", text)
        entry = re.search(r"\.entry\s+\w+\(([^)]*)\)[^{]*\{(.*)", text, re.S)
        assert entry is not None
        program = cls(parameters=re.findall(r"(\w+)\s*(?:,|$)", entry[1].strip()))
        scopes: list[dict[str, str]] = [{}]
        body = re.sub(r"^\s*\.(loc|pragma|section|file)[^\n]*$", "", entry[2], flags=re.M)
        for piece in re.sub(r"(\$?\w+):\s*\n", r"\1:;", body).split(";"):
            piece = piece.strip()
            while piece[:1] in ("{", "}"):
                scopes = [*scopes, {}] if piece[0] == "{" else scopes[:-1]
                piece = piece[1:].strip()
                if not scopes:
                    return program
            if not piece:
                continue
            if piece.endswith(":"):
                program.labels[piece[:-1]] = len(program.instructions)
            elif piece.startswith(".reg"):
                program._declare(piece, scopes)
            elif variable := re.fullmatch(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", piece):
                if variable[1] in program.shared:
                    raise ValueError(f"{variable[1]} is declared twice")
                program.shared[variable[1]] = int(variable[2])
            elif not piece.startswith("."):
                program._add(piece, scopes)
        return program

    def _declare(self, piece: str, scopes: list[dict[str, str]]) -> None:
        _, kind, names = piece.split(None, 2)
        for name in map(str.strip, names.split(",")):
            size = 0 if kind == ".pred" else int(kind[2:]) // 8
            if counted := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self.sizes |= {f"{counted[1]}{i}": size for i in range(int(counted[2]))}
            else:
                scopes[-1][name] = f"{name}#{len(self.sizes)}"
                self.sizes[scopes[-1][name]] = size

    def _add(self, piece: str, scopes: list[dict[str, str]]) -> None:
        for scope in scopes:
            for name, unique in scope.items():
                piece = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?![\w.])", unique, piece)
        guard = re.match(r"@(!?)([%\w#]+)\s+", piece)
        rest = piece[guard.end() :] if guard else piece
        opcode, _, operands = rest.partition(" ") if " " in rest.split("\t")[0] else rest.partition("\t")
        self.instructions.append(Instruction(piece, guard[2] if guard else "", bool(guard and guard[1]), tuple(opcode.strip().split(".")),
                                             _operands(operands)))  # fmt: skip
