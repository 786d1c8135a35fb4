"""Numbers that are not finite: found in block scales and float tensors by their exponent bits, a few comparisons a block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.exporter.source.gguf import GGUFFile

CHUNK_BYTES = 32 << 20
MAX_WORKERS = 8
TOO_LARGE = 253  # a power of two that float32 cannot hold 12 times, which MXFP4 may ask for; 255 is a NaN by its standard
# type -> (little-endian integer of a value, its exponent bits: all of them set in an infinity and in a NaN)
_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


def bad_position(block_type: str, values: np.ndarray) -> tuple[int, ...] | None:
    """The first index that is not finite of values of the float type `block_type`, given as themselves, as integers or (flat) as bytes."""
    code, exponent = _EXPONENT[block_type]
    bits = values.view(code)
    bits = np.bitwise_and(bits, np.dtype(code).type(exponent))
    if not bits.size or bits.max() != exponent:
        return None
    return tuple(int(i) for i in np.argwhere(bits == exponent)[0])


def bad_halves(block_type: str, halves: np.ndarray) -> bool:
    """Whether a scale among packed halves [G, H, N] of this block type is not finite."""
    if LAYOUTS[block_type].scales == "e8m0":
        bits = halves.view(np.uint16)
        return bool(((bits & 255) >= TOO_LARGE).any() or (bits >> 8 >= TOO_LARGE).any())
    return bad_position("F16", halves[:, : len(LAYOUTS[block_type].half_fields)]) is not None


def bad_row(block_type: str, rows: np.ndarray) -> int | None:
    """The first row with a scale or value that is not finite: `rows` uint8 [n, row bytes] as in the file, `block_type` a loadable type."""
    if block_type in LAYOUTS:
        layout = LAYOUTS[block_type]
        blocks = rows.reshape(len(rows), -1, layout.block_bytes)
        found = [bad_position("F16", blocks[:, :, at : at + 2].view("<u2")) for at in layout.half_fields]
        if layout.scales == "e8m0":
            bad = np.argwhere((blocks[:, :, list(layout.byte_fields[0])] >= TOO_LARGE).any((1, 2)))
            found = [tuple(int(i) for i in bad[0])] if len(bad) else []
        return min((index[0] for index in found if index), default=None)
    index = bad_position(block_type, rows.view(_EXPONENT[block_type][0]))
    return index[0] if index else None


def describe(gguf: GGUFFile, name: str, row: int) -> str:
    """The error line for row `row` of a tensor; for a tensor of one dimension its element."""
    info = gguf.tensors[name]
    what = "a block scale" if info.type in LAYOUTS else "a value"
    where = f"element {row}" if len(info.shape) == 1 else f"row {row}"
    return (f"{gguf.path}: tensor {name}, {where}: {what} is not finite (NaN or infinity); the file is damaged, or was made from a "
            "damaged model: download it again, or keep it with --allow-nonfinite")  # fmt: skip


def scan(gguf: GGUFFile, names: Iterable[str], progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """An error line for each tensor with a number that is not finite. Reads every page of them; a hole in a file is known to be zeros.
    `progress(tensor name, bytes done, bytes in all)` is called after each tensor that is read."""
    names = [name for name in names if not _is_hole(gguf, name)]
    total, done, problems = sum(gguf.tensors[name].nbytes for name in names), 0, []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_WORKERS)) as pool:
        for name, row in zip(names, pool.map(lambda name: _scan_tensor(gguf, name), names), strict=True):
            done += gguf.tensors[name].nbytes
            if progress:
                progress(name, done, total)
            if row is not None:
                problems.append(describe(gguf, name, row))
    return problems


def _scan_tensor(gguf: GGUFFile, name: str) -> int | None:
    info, data = gguf.tensors[name], gguf.data(name)
    if len(info.shape) == 1:  # an element is a row
        data = data.reshape(info.shape[0], -1)
    step = max(1, CHUNK_BYTES // max(1, data.shape[1]))
    for start in range(0, len(data), step):
        row = bad_row(info.type, data[start : start + step])
        gguf.release(name, start * data.shape[1], min(start + step, len(data)) * data.shape[1])
        if row is not None:
            return start + row
    return None


def _is_hole(gguf: GGUFFile, name: str) -> bool:
    info = gguf.tensors[name]
    try:
        fd = os.open(gguf.files[info.file], os.O_RDONLY)
    except OSError:
        return False  # the mapping is read
    try:
        return os.lseek(fd, info.offset, os.SEEK_DATA) >= info.offset + info.nbytes
    except OSError as e:
        return e.errno == 6  # ENXIO: no data from here on
    finally:
        os.close(fd)
