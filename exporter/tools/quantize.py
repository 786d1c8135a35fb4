"""Float tensors -> GGUF blocks, and a float GGUF file -> a quantized one.

Q4_0, Q5_0 and Q8_0 take the block's extreme value as the scale. K-quants search: for every group the scale (and minimum) of least weighted
squared error among a fixed set of candidates, then 6- or 8-bit scales, then integers again for the rounded scales.
Block formats: `custom_ops/weights/block_types.py`; the files we read are read by the `gguf` package's dequantizers in the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from kiln.custom_ops.dtypes import FLOATS
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.mixes import MIXES, block_types
from kiln.exporter.errors import KilnError
from kiln.exporter.files import replacing
from kiln.exporter.source.gguf import GGUFFile, open_gguf
from kiln.exporter.tools.synth import Tensor, gguf_header, key_value

CHUNK = 1 << 20  # elements of one search: about 20 arrays of this size are alive
_TINY = np.float32(1e-15)


def _halves(d: np.ndarray) -> np.ndarray:
    """[n, 1] float -> [n, 2] bytes of float16."""
    return np.ascontiguousarray(d.astype("<f2")).view(np.uint8)


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _round(x: np.ndarray) -> np.ndarray:
    """Half away from zero, as C's roundf."""
    a = np.abs(x)
    whole = np.floor(a)
    return np.copysign(whole + np.floor(2 * (a - whole)), x)


def _q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.concatenate([_halves(d), _round(x * _inverse(d)).astype(np.int8).view(np.uint8)], axis=1)


def _extreme(x: np.ndarray) -> np.ndarray:
    """[n, k] -> [n, 1]: the value of largest magnitude, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def _symmetric(x: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [n, 1] that puts the extreme value at -half, and integers 0 .. 2 half - 1."""
    d = _extreme(x) / np.float32(-half)
    q = np.trunc(x * _inverse(d) + np.float32(half + 0.5)).astype(np.uint8)
    return d, q.clip(0, 2 * half - 1)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """[n, 32] -> [n, 16]: element j low, element j + 16 high."""
    return (q[:, :16] & 15) | (q[:, 16:] << 4)


def _q4_0(x: np.ndarray) -> np.ndarray:
    d, q = _symmetric(x, 8)
    return np.concatenate([_halves(d), _nibbles(q)], axis=1)


def _q5_0(x: np.ndarray) -> np.ndarray:
    d, q = _symmetric(x, 16)
    return np.concatenate([_halves(d), np.packbits(q >> 4, axis=1, bitorder="little"), _nibbles(q)], axis=1)


def _q5_1(x: np.ndarray) -> np.ndarray:
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(31)
    q = np.trunc((x - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 31)
    return np.concatenate([_halves(d), _halves(low), np.packbits(q >> 4, axis=1, bitorder="little"), _nibbles(q)], axis=1)


def _scale_and_min(x: np.ndarray, weight: np.ndarray, top: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale s and offset m >= 0 [n, 1] of x ~ s q - m, q in 0 .. top, of least weighted squared error.

    Each candidate fixes the integers of a slightly larger or smaller scale, then solves for the s and m that suit them best.
    """
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    span = x.max(axis=1, keepdims=True) - low
    sum_w, sum_x = weight.sum(1, keepdims=True), (weight * x).sum(1, keepdims=True)
    best_s, best_m = span / np.float32(top), -low
    q = np.rint((x - low) * _inverse(best_s)).clip(0, top)
    best = (weight * np.square(best_s * q + low - x)).sum(1, keepdims=True)
    for step in steps:
        q = np.rint((x - low) * (np.float32(top + step) * _inverse(span))).clip(0, top)
        wq = weight * q
        sum_q, sum_qq, sum_qx = wq.sum(1, keepdims=True), (wq * q).sum(1, keepdims=True), (wq * x).sum(1, keepdims=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        inverse = _inverse(np.where(determinant > 0, determinant, 0))
        s = (sum_w * sum_qx - sum_x * sum_q) * inverse
        m = (sum_qq * sum_x - sum_q * sum_qx) * inverse
        alone = m > 0  # the format subtracts the minimum: a positive offset cannot be stored
        s, m = np.where(alone, sum_qx * _inverse(sum_qq), s), np.where(alone, 0, m)
        error = (weight * np.square(s * q + m - x)).sum(1, keepdims=True)
        better = (error < best) & (inverse > 0) & (s > 0)
        best, best_s, best_m = np.where(better, error, best), np.where(better, s, best_s), np.where(better, -m, best_m)
    return best_s, best_m


def _k_with_min(x: np.ndarray, top: int) -> tuple[list[np.ndarray], np.ndarray]:
    """[n, 256] -> the fields d, dmin, 12 scale bytes, and integers [n, 8, 32]."""
    groups = x.reshape(-1, 32)
    weight = np.sqrt(np.square(groups).mean(1, keepdims=True)) + np.abs(groups)
    steps = np.arange(21) * 0.1 - 1.0 if top == 15 else np.arange(16) * 0.1 - 0.5
    scale, minimum = (v.reshape(-1, 8) for v in _scale_and_min(groups, weight, top, steps.astype(np.float32)))
    largest, deepest = scale.max(1, keepdims=True), minimum.max(1, keepdims=True)
    s = np.rint(scale * (63 * _inverse(largest))).clip(0, 63).astype(np.uint8)
    m = np.rint(minimum * (63 * _inverse(deepest))).clip(0, 63).astype(np.uint8)
    d, dmin = _halves(largest / 63), _halves(deepest / 63)
    step = (d.view("<f2").astype(np.float32) * s)[..., None]
    offset = (dmin.view("<f2").astype(np.float32) * m)[..., None]
    q = np.rint((x.reshape(-1, 8, 32) + offset) * _inverse(step)).clip(0, top).astype(np.uint8)
    packed = [s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | (m[:, 4:] << 4)]
    return [d, dmin, *packed], q


def _runs(q: np.ndarray) -> np.ndarray:
    """[n, 8, 32] -> [n, 128]: group 2c low, group 2c + 1 high."""
    return ((q[:, 0::2] & 15) | (q[:, 1::2] << 4)).reshape(len(q), 128)


def _q4_k(x: np.ndarray) -> np.ndarray:
    fields, q = _k_with_min(x, 15)
    return np.concatenate([*fields, _runs(q)], axis=1)


def _q5_k(x: np.ndarray) -> np.ndarray:
    fields, q = _k_with_min(x, 31)
    fifth = np.packbits(q >> 4, axis=1, bitorder="little").reshape(len(q), 32)  # bit g of byte l is group g's element l
    return np.concatenate([*fields, fifth, _runs(q)], axis=1)


def _q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, 16)
    extreme = _extreme(groups)
    weight = np.square(groups)
    best, best_scale = np.full_like(extreme, -1), np.zeros_like(extreme)
    for step in (0, *range(-9, 0), *range(1, 10)):
        q = np.rint(groups * (np.float32(-(32 + 0.1 * step)) * _inverse(extreme))).clip(-32, 31)
        wq = weight * q
        sum_qx, sum_qq = (wq * groups).sum(1, keepdims=True), (wq * q).sum(1, keepdims=True)
        scale = sum_qx * _inverse(sum_qq)
        gain = scale * sum_qx  # how much this scale takes off the squared error
        better = gain > best
        best, best_scale = np.where(better, gain, best), np.where(better, scale, best_scale)
    scale = best_scale.reshape(-1, 16)
    largest = _extreme(scale)
    largest = np.where(np.abs(largest) < _TINY, 0, largest)
    s = np.rint(scale * (-128 * _inverse(largest))).clip(-128, 127).astype(np.int8)
    d = _halves(largest / -128)
    step = (d.view("<f2").astype(np.float32) * s)[..., None]
    q = (np.rint(x.reshape(-1, 16, 16) * _inverse(step)).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # half, quarter
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] << 4)
    high = q >> 4
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), d], axis=1)


_BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def quantize(block_type: str, x: np.ndarray) -> np.ndarray:
    """float32 [N, K] -> the blocks of its rows, uint8 [N, bytes of a row]; F32, F16 and BF16 (to nearest even) are also block_types.

    Raises KilnError for an unknown block_type, for rows that are no multiple of the block, and for values that are not finite.
    """
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2:
        raise KilnError(f"a matrix is quantized, not an array of shape {list(x.shape)}")
    if not np.isfinite(x).all():
        raise KilnError("the matrix has values that are not finite; train or convert the model again")
    if block_type in ("F32", "F16"):
        return x.astype("<f4" if block_type == "F32" else "<f2").view(np.uint8)
    if block_type == "BF16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    if block_type not in _BLOCKS:
        raise KilnError(f"no quantizer for block type {block_type}; known: {', '.join(_BLOCKS)}")
    block, size = LAYOUTS[block_type].block, LAYOUTS[block_type].block_bytes
    rows, columns = x.shape
    if columns % block:
        raise KilnError(f"rows of {columns} elements are no multiple of the {block} of a {block_type} block")
    flat, step = x.reshape(-1, block), max(1, CHUNK // block)
    out = np.empty((len(flat), size), np.uint8)
    for start in range(0, len(flat), step):
        out[start : start + step] = _BLOCKS[block_type](flat[start : start + step])
    return out.reshape(rows, columns // block * size)


def to_float(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor of any known type as float32, in its own shape (the `gguf` package's dequantization)."""
    from gguf import quants

    info = file.tensors[name]
    values = quants.dequantize(file.data(name), GGMLQuantizationType(info.ggml_type))
    return np.ascontiguousarray(values, np.float32).reshape(info.shape)


def quantized_plan(file: GGUFFile, mix: str) -> list[Tensor]:
    """Every tensor of `file` as (name, shape, type under `mix`): llama-quantize's rules without an importance matrix."""
    if mix not in MIXES:
        raise KilnError(f"unknown mix {mix!r}; known: {', '.join(MIXES)}")
    for name, info in file.tensors.items():
        if info.type not in FLOATS:
            raise KilnError(f"{file.path}: tensor {name} is {info.type} already; quantize from a file of {', '.join(FLOATS)} tensors")
    types = block_types(MIXES[mix], {name: info.shape for name, info in file.tensors.items()})
    return [(name, info.shape, types[name]) for name, info in file.tensors.items()]


def write_quantized(path_in: str | Path, path_out: str | Path, mix: str, workers: int | None = None) -> list[Tensor]:
    """Writes `path_in` (a GGUF file of float tensors) with the types of `mix` and returns its tensors; metadata is kept as it is.

    mix: a key of MIXES. The file appears under its name only when complete. Raises KilnError.
    """
    path_out = Path(path_out)
    file = open_gguf(path_in)
    plan = quantized_plan(file, mix)
    metadata = [(key, *file.metadata.raw(key)) for key in file.metadata if key not in ("general.file_type", "general.quantization_version")]
    metadata += [
        key_value("general.file_type", GGUFValueType.UINT32, int(LlamaFileType[MIXES[mix].file_type])),
        key_value("general.quantization_version", GGUFValueType.UINT32, 2),
    ]
    header, offsets, size = gguf_header(metadata, plan)

    def blocks(tensor: Tensor) -> np.ndarray:
        name, shape, block_type = tensor
        values = to_float(file, name)
        try:
            return quantize(block_type, values.reshape(-1, shape[-1]))
        except KilnError as e:
            raise KilnError(f"{file.path}: tensor {name}: {e}") from e

    with replacing(path_out, f"{size / 2**20:.0f} MiB") as f, ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        f.write(header)
        for offset, raw in zip(offsets, pool.map(blocks, plan), strict=True):
            f.write(bytes(offset - f.tell()))
            f.write(raw.data)
        f.write(bytes(size - f.tell()))
    return plan
