"""Machine code: CUDA images inside a file, their kernels and parameters, and the instructions of a kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import triton

EM_CUDA = 190
# Attributes of a kernel: EIATTR_PARAM_CBANK, EIATTR_KPARAM_INFO, EIATTR_MAXREG_COUNT.
PARAMETERS_AT, PARAMETER, MOST_REGISTERS = 0x0A, 0x17, 0x1B


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel: the bytes of constant bank 0 that hold it."""

    begin: int
    end: int
    pointer: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!P0 LDG.E R4, desc[UR4][R2.64]`. target: the index of where it branches, -1 where that is not known."""

    address: int
    guard: str  # "" or as `@!P0`
    op: str
    operands: tuple[str, ...]
    target: int | None = None

    @property
    def base(self) -> str:
        return self.op.split(".")[0]

    def __str__(self) -> str:
        return f"{self.guard} {self.op} {', '.join(self.operands)}".strip()


def images(data: bytes) -> list[bytes]:
    """The CUDA ELF images inside `data`, in its order."""
    found = []
    for match in re.finditer(b"\x7fELF\x02\x01", data):
        start = match.start()
        if struct.unpack_from("<H", data, start + 18)[0] == EM_CUDA:
            sections, entry, count = *struct.unpack_from("<Q", data, start + 40), *struct.unpack_from("<HH", data, start + 58)
            segments, size, number = *struct.unpack_from("<Q", data, start + 32), *struct.unpack_from("<HH", data, start + 54)
            found.append(data[start : start + max(sections + entry * count, segments + size * number)])
    return found


def sections(image: bytes) -> dict[str, bytes]:
    """The ELF sections of an image by name."""
    (at,), (entry, count, names) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, at + entry * i) for i in range(count)]
    table = headers[names][4]
    return {image[table + h[0] : image.index(b"\0", table + h[0])].decode(): image[h[4] : h[4] + h[5]] for h in headers}


def kernels(image: bytes) -> list[str]:
    """Names of the kernels of an image."""
    return [name.removeprefix(".text.") for name in sections(image) if name.startswith(".text.")]


def _attributes(image: bytes, kernel: str) -> Iterator[tuple[int, int, bytes]]:
    """(attribute, its size or, where it has no further bytes, its value, those bytes)."""
    data, at = sections(image)[f".nv.info.{kernel}"], 0
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        value = data[at + 4 : at + 4 + size] if form == 4 else b""  # other forms have their value in place of the size
        yield attribute, size, value
        at += 4 + len(value)


def most_registers(image: bytes, kernel: str) -> int | None:
    """Registers that a thread of the kernel was compiled to have at most, where it was told."""
    return next((size for attribute, size, _ in _attributes(image, kernel) if attribute == MOST_REGISTERS), None)


def parameters(image: bytes, kernel: str) -> list[Parameter]:
    """The arguments of a kernel in order."""
    base, found = 0, {}
    for attribute, _, value in _attributes(image, kernel):
        if attribute == PARAMETERS_AT:
            base = struct.unpack_from("<H", value, 4)[0]
        elif attribute == PARAMETER:
            ordinal, offset, what = struct.unpack_from("<HHI", value, 4)
            found[ordinal] = (offset, what >> 18, what >> 8 & 15 == 4)
    return [Parameter(base + offset, base + offset + size, pointer) for _, (offset, size, pointer) in sorted(found.items())]


def disassembled(image: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(image)
        f.flush()
        return subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", f.name], capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_CODE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SCHEDULE = re.compile(r"\s+[&?].*$")  # newer architectures show how an instruction is scheduled
_OPERAND = re.compile(r"(?:[^,\[\(]|\[[^\]]*\]|\([^\)]*\))+")


def instructions(text: str) -> list[Instruction]:
    """The instructions of a disassembled image of one kernel, branches resolved."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := _CODE.match(line):
            operands = tuple(o.strip() for o in _OPERAND.findall(_SCHEDULE.sub("", code[4])))
            found.append(Instruction(int(code[1], 16), (code[2] or "").strip(), code[3], operands))
    for i, instruction in enumerate(found):
        named = re.search(r"`\(([^)]*)\)", " ".join(instruction.operands))
        if instruction.base in ("BRA", "CALL", "JMP", "BRX", "JMX"):
            target = labels.get(named[1], -1) if named and instruction.base not in ("BRX", "JMX") else -1
            found[i] = Instruction(instruction.address, instruction.guard, instruction.op, instruction.operands, target)
    return found
