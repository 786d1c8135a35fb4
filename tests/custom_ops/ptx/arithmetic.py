"""What an instruction computes of values that a thread each has: arrays with one element for each thread, signed, unsigned or float."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.custom_ops.ptx.program import Instruction

Values = np.ndarray
TYPES = {"b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "b32": "u4", "u32": "u4", "s32": "i4",
         "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8"}  # fmt: skip
COMPARISONS: dict[str, Any] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                               "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
                               "hs": np.greater_equal}  # fmt: skip
ROUNDINGS: dict[str, Any] = {"rzi": np.trunc, "rmi": np.floor, "rni": np.rint, "rpi": np.ceil}


def rounded(value: Values, kind: str) -> Values:
    """Bits of float32 values as another kind of float; of tf32 the nearest, ties away from zero."""
    if kind == "f16":
        return value.astype("f2").view("u2")
    if kind == "bf16":
        return torch.from_numpy(np.ascontiguousarray(value)).bfloat16().view(torch.int16).numpy().view("u2")
    bits = np.ascontiguousarray(value).view("u4")
    return np.where(np.isfinite(value), bits + np.uint32(0x1000) & ~np.uint32(0x1FFF), bits).astype("u4")


def _shift(i: Instruction, value: Values, by: Values) -> Values:
    bits, by = 8 * value.dtype.itemsize, by.astype(np.int64) & 0xFFFFFFFF
    if i.base == "shl":
        return np.where(by < bits, value << np.minimum(by, bits - 1).astype(value.dtype), 0)
    return value >> np.minimum(by, bits - 1).astype(value.dtype) if value.dtype.kind == "i" else np.where(
        by < bits, value >> np.minimum(by, bits - 1).astype(value.dtype), 0)  # fmt: skip


def _funnel(i: Instruction, low: Values, high: Values, by: Values) -> Values:
    """32 of the 64 bits high : low, moved left or right."""
    if i.parts[2] != "wrap":
        raise NotImplementedError(i.text)
    both, by = high.astype("u8") << np.uint64(32) | low, by.astype("u8") & np.uint64(31)
    return (both << by >> np.uint64(32) if i.parts[1] == "l" else both >> by).astype("u4")


def _divide(i: Instruction, a: Values, b: Values) -> Values:
    return a / b if a.dtype.kind == "f" else np.trunc(a.astype(np.longdouble) / b).astype(a.dtype)


def _fma(i: Instruction, a: Values, b: Values, c: Values) -> Values:
    return (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype(a.dtype)


def _logic(of_integers: Any, of_predicates: Any) -> Any:
    return lambda i, a, b: (of_predicates if i.parts[-1] == "pred" else of_integers)(a, b)


def _extreme(smaller: Any, larger: Any) -> Any:
    """Of floats NaN is nobody's choice unless the instruction says so."""
    return lambda i, a, b: (larger if a.dtype.kind == "f" and "NaN" not in i.parts else smaller)(a, b)


ARITHMETIC: dict[str, Any] = {
    "add": lambda i, a, b: a + b,
    "sub": lambda i, a, b: a - b,
    "neg": lambda i, a: -a,
    "abs": lambda i, a: np.abs(a),
    "and": _logic(np.bitwise_and, np.logical_and),
    "or": _logic(np.bitwise_or, np.logical_or),
    "xor": _logic(np.bitwise_xor, np.logical_xor),
    "not": lambda i, a: ~a,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "div": _divide,
    "rem": lambda i, a, b: a - _divide(i, a, b) * b,
    "fma": _fma,
    "rsqrt": lambda i, a: (1 / np.sqrt(a.astype("f8"))).astype(a.dtype),
    "sqrt": lambda i, a: np.sqrt(a),
    "rcp": lambda i, a: 1 / a,
    "ex2": lambda i, a: np.exp2(a.astype("f8")).astype(a.dtype),
    "lg2": lambda i, a: np.log2(a.astype("f8")).astype(a.dtype),
    "cvta": lambda i, a: a,
}
