"""A thread block played by its PTX, and the memory that it may touch."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

from tests.custom_ops.ptx.arithmetic import ARITHMETIC, COMPARISONS, ROUNDINGS, TYPES, Values, rounded
from tests.custom_ops.ptx.program import Instruction, Program

BASE, GAP = 1 << 36, 256  # where memory begins, and what lies between two tensors
ENDS = ("bra", "ret", "exit", "bar", "barrier")  # of a run of instructions


class Memory:
    """The tensors of a launch, one after another, and what lies around them."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self.starts, at = {}, GAP
        for pointer, storage in self.tensors.items():
            self.starts[pointer] = at
            at += -(-(storage.nbytes() + GAP) // GAP) * GAP
        self.bytes, self.valid = np.zeros(at, np.uint8), np.zeros(at, bool)
        for pointer, storage in self.tensors.items():
            start = self.starts[pointer]
            self.bytes[start : start + storage.nbytes()] = self._of(storage)
            self.valid[start : start + storage.nbytes()] = True

    @staticmethod
    def _of(storage: torch.UntypedStorage) -> Values:
        return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()  # type: ignore[call-overload]

    def address(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage().data_ptr()
        return BASE + self.starts[storage] + t.data_ptr() - storage if t.numel() else BASE

    def take_back(self) -> None:
        for pointer, storage in self.tensors.items():
            start = self.starts[pointer]
            self._of(storage)[:] = self.bytes[start : start + storage.nbytes()]


class Block:
    """One thread block, played to its end."""

    def __init__(self, program: Program, threads: int, shared: int, memory: Memory, arguments: dict[str, int | float]):
        self.program, self.threads, self.memory, self.arguments = program, threads, memory, arguments
        self.symbols, at = {"global_smem": 0}, -(-shared // 16) * 16
        for name, size in program.shared.items():
            self.symbols[name] = at
            at += -(-size // 16) * 16
        self.shared = np.zeros(at, np.uint8)
        self.lane = np.arange(threads)
        self.zero = {size: np.zeros(threads, f"u{size}" if size else bool) for size in (0, 1, 2, 4, 8)}

    def run(self, at: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        self.registers: dict[str, Values] = {}
        self.special = {f"%ctaid.{n}": v for n, v in zip("xyz", at, strict=True)}
        self.special |= {f"%nctaid.{n}": v for n, v in zip("xyz", grid, strict=True)}
        self.special |= {"%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0} | self.symbols
        self.copies: list[list[Callable[[], None]]] = [[]]  # asynchronous ones, the last entry those that no group has yet
        pc, alive, waiting = np.zeros(self.threads, np.int64), np.ones(self.threads, bool), np.zeros(self.threads, bool)
        joins, instructions = set(self.program.labels.values()), self.program.instructions
        while alive.any():
            ready = alive & ~waiting
            if not ready.any():  # all have come to the barrier
                waiting[:] = False
                continue
            here = int(pc[ready].min())
            mask = ready & (pc == here)
            while True:
                instruction = instructions[here]
                taken = mask
                if instruction.guard:
                    taken = mask & (self.registers[instruction.guard] != instruction.negated)
                here += 1
                if instruction.base in ENDS and not (instruction.base == "bar" and instruction.parts[1] == "warp"):
                    pc[mask] = here
                    if instruction.base == "bra":
                        pc[taken] = self.program.labels[instruction.operands[0]]
                    elif instruction.base in ("ret", "exit"):
                        alive &= ~taken
                    else:
                        waiting |= taken
                    break
                if taken.any():
                    try:
                        self._play(instruction, None if taken.all() else taken)
                    except Exception as error:
                        error.add_note(f"in `{instruction.text}`")
                        raise
                if here in joins:
                    pc[mask] = here
                    break

    # ---- operands ----

    def _read(self, operand: str, dtype: str) -> Values:
        """The operand of every thread, as dtype."""
        if operand in self.registers or operand in self.program.sizes:
            value = self.registers.get(operand, self.zero[self.program.sizes[operand]])
            if dtype == "?":
                return value
            if value.dtype.itemsize == np.dtype(dtype).itemsize:
                return value.view(dtype)
            return value.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)  # cut, or with zeros before it
        if operand == "%tid.x":
            return self.lane.astype(dtype)
        if operand == "%laneid":
            return (self.lane % 32).astype(dtype)
        if operand == "%lanemask_lt":
            return ((1 << self.lane % 32) - 1).astype(dtype)
        if operand in self.special:
            return np.full(self.threads, self.special[operand]).astype(dtype)
        if operand.startswith("0f"):
            bits = np.full(self.threads, int(operand[2:], 16), np.uint32)
            return bits if dtype == "?" else bits.view(dtype) if np.dtype(dtype).itemsize == 4 else bits.astype(dtype)
        return np.full(self.threads, int(operand.rstrip("U"), 0)).astype(dtype)

    def _write(self, register: str, value: Values, mask: Values | None) -> None:
        if register == "_":
            return
        size = self.program.sizes[register]
        if size and value.dtype.itemsize != size:  # what is narrower is extended by its own sign
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
        value = value.view(f"u{size}") if size else value.astype(bool)
        if mask is not None:
            value = np.where(mask, value, self.registers.get(register, self.zero[size]))
        self.registers[register] = value

    def _addresses(self, operand: str) -> Values:
        name, _, offset = operand[1:-1].replace(" ", "").partition("+")
        return self._read(name, "u8").view("i8") + (int(offset) if offset else 0)

    def _space(self, parts: tuple[str, ...], addresses: Values, size: int, mask: Values | None) -> tuple[Values, Values]:
        """Memory and, of the threads of the mask, where their accesses of so many bytes begin in it."""
        at = addresses if mask is None else addresses[mask]
        if "shared" in parts or any(p.startswith("shared::") for p in parts):
            if ((at < 0) | (at + size > self.shared.size) | (at % size != 0)).any():
                raise IndexError(f"shared memory of {self.shared.size} bytes: {size} at {at.tolist()}")
            return self.shared, at
        at = at - BASE
        inside = (at >= 0) & (at + size <= self.memory.valid.size)
        if not inside.all() or not self.memory.valid[at[:, None] + np.arange(size)].all() or (at % size != 0).any():
            raise IndexError(f"global memory: {size} bytes at {[hex(a) for a in at.tolist()]}, outside every tensor or not aligned")
        return self.memory.bytes, at

    # ---- instructions ----

    def _play(self, i: Instruction, mask: Values | None) -> None:
        handler: Callable[[Instruction, Values | None], None] | None = getattr(self, f"_op_{i.base}", None)
        if handler is not None:
            handler(i, mask)
            return
        dtype = TYPES.get(i.parts[-1], "?")
        if i.base not in ARITHMETIC:
            raise NotImplementedError(i.text)
        with np.errstate(all="ignore"):
            values = [self._read(operand, dtype) for operand in i.operands[1:]]
            result = ARITHMETIC[i.base](i, *values)
        self._write(i.operands[0], np.asarray(result, dtype=result.dtype if dtype == "?" else dtype), mask)

    def _op_ld(self, i: Instruction, mask: Values | None) -> None:
        if "param" in i.parts:
            value, dtype = self.arguments[i.operands[1][1:-1]], TYPES[i.parts[-1]]
            kind = "f4" if isinstance(value, float) else dtype
            self._write(i.operands[0], np.full(self.threads, value).astype(kind).view(dtype), mask)
            return
        dtype = TYPES[i.parts[-1]]
        registers = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        size = np.dtype(dtype).itemsize
        memory, at = self._space(i.parts, self._addresses(i.operands[1]), size * len(registers), mask)
        for n, register in enumerate(registers):
            found = memory[(at + n * size)[:, None] + np.arange(size)].reshape(-1).view(dtype)
            if mask is not None:
                whole = np.zeros(self.threads, dtype)
                whole[mask] = found
                found = whole
            self._write(register, found, mask)

    def _op_st(self, i: Instruction, mask: Values | None) -> None:
        dtype = TYPES[i.parts[-1]]
        registers = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
        size = np.dtype(dtype).itemsize
        memory, at = self._space(i.parts, self._addresses(i.operands[0]), size * len(registers), mask)
        for n, register in enumerate(registers):
            value = self._read(register, f"u{size}")
            value = value if mask is None else value[mask]
            memory[(at + n * size)[:, None] + np.arange(size)] = np.ascontiguousarray(value).view(np.uint8).reshape(-1, size)

    def _op_cp(self, i: Instruction, mask: Values | None) -> None:
        """Asynchronous copies to shared memory, which are made as late as the code lets them be, at once in all threads."""
        if i.parts[1] != "async":
            raise NotImplementedError(i.text)
        if i.parts[2] == "commit_group":
            self.copies.append([])
        elif i.parts[2] == "wait_group":
            self._whole_warps(mask)
            while len(self.copies) - 1 > int(i.operands[0]):
                for copy in self.copies.pop(0):
                    copy()
        else:
            size = int(i.operands[2], 0)
            to, at = self._space(("shared",), self._addresses(i.operands[0]), size, mask)
            whole = np.ones(at.size, bool)  # the others get zeros, and where these would come from is not looked at
            if len(i.operands) > 3:
                read = self._read(i.operands[3], "u4")
                whole = (read if mask is None else read[mask]) == size
                if not (whole | ((read if mask is None else read[mask]) == 0)).all():
                    raise NotImplementedError(i.text)
            threads = np.flatnonzero(np.ones(self.threads, bool) if mask is None else mask)[whole]
            taken = np.zeros(self.threads, bool)
            taken[threads] = True
            given, source = self._space(("global",), self._addresses(i.operands[1]), size, taken)

            def copy() -> None:
                to[at[~whole][:, None] + np.arange(size)] = 0
                to[at[whole][:, None] + np.arange(size)] = given[source[:, None] + np.arange(size)]

            self.copies[-1].append(copy)

    def _op_atom(self, i: Instruction, mask: Values | None) -> None:
        if "add" not in i.parts or i.parts[-1] not in ("u32", "s32"):
            raise NotImplementedError(i.text)
        memory, at = self._space(i.parts, self._addresses(i.operands[1]), 4, mask)
        value, found = self._read(i.operands[2], "u4"), np.zeros(self.threads, np.uint32)
        for thread, where in zip(np.flatnonzero(np.ones(self.threads, bool) if mask is None else mask), at, strict=True):
            cell = memory[where : where + 4].view(np.uint32)
            found[thread] = cell[0]
            cell[0] += value[thread]
        self._write(i.operands[0], found, mask)

    def _op_mov(self, i: Instruction, mask: Values | None) -> None:
        to, given = i.operands
        if isinstance(given, tuple):  # several in one
            whole = np.ascontiguousarray(np.stack([self._read(g, "?") for g in given], 1))
            self._write(to, whole.reshape(-1).view(f"u{whole.itemsize * len(given)}"), mask)
        elif isinstance(to, tuple):
            value = np.ascontiguousarray(self._read(given, "?"))
            for n, register in enumerate(to):
                parts = value.view(f"u{value.itemsize // len(to)}").reshape(self.threads, -1)
                self._write(register, np.ascontiguousarray(parts[:, n]), mask)
        else:
            self._write(to, self._read(given, "?" if i.parts[-1] == "pred" else TYPES[i.parts[-1]]), mask)

    def _op_cvt(self, i: Instruction, mask: Values | None) -> None:
        to, given = (p for p in i.parts[1:] if p in TYPES or p in ("bf16", "f16x2", "bf16x2", "tf32"))
        if to.endswith("x2"):
            high, low = (rounded(self._read(o, "f4"), to[:-2]).astype("u4") for o in i.operands[1:])
            self._write(i.operands[0], low | high << 16, mask)
            return
        value = self._read(i.operands[1], TYPES.get(given, "u2"))
        if given == "bf16":
            value = (value.astype("u4") << 16).view("f4")
        with np.errstate(all="ignore"):
            for rounding in (ROUNDINGS[p] for p in i.parts if p in ROUNDINGS and value.dtype.kind == "f"):
                value = rounding(value)
            if to in ("bf16", "tf32"):
                value = rounded(value.astype("f4"), to)
            else:
                if value.dtype.kind == "f" and TYPES[to][0] != "f":
                    limits = np.iinfo(TYPES[to])
                    value = np.where(np.isnan(value), 0, np.clip(value.astype("f8"), limits.min, limits.max))
                value = value.astype(TYPES[to])
        self._write(i.operands[0], value, mask)

    def _op_setp(self, i: Instruction, mask: Values | None) -> None:
        dtype, name = TYPES[i.parts[-1]], i.parts[1]
        a, b = self._read(i.operands[1], dtype), self._read(i.operands[2], dtype)
        with np.errstate(all="ignore"):
            if name in COMPARISONS:
                result = COMPARISONS[name](a, b)
                if name == "ne" and a.dtype.kind == "f":
                    result &= ~(np.isnan(a) | np.isnan(b))
            elif name in ("num", "nan"):
                result = (np.isnan(a) | np.isnan(b)) == (name == "nan")
            else:  # unordered: true of NaN, too
                result = COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        if i.parts[2] in ("and", "or", "xor"):
            other = self._read(i.operands[3].lstrip("!"), "?") != i.operands[3].startswith("!")
            result = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.parts[2]](result, other)
        self._write(i.operands[0], result, mask)

    def _op_selp(self, i: Instruction, mask: Values | None) -> None:
        dtype = TYPES[i.parts[-1]]
        first, second = (self._read(o, dtype) for o in i.operands[1:3])
        self._write(i.operands[0], np.where(self._read(i.operands[3], "?"), first, second), mask)

    def _op_prmt(self, i: Instruction, mask: Values | None) -> None:
        a, b, selector = (self._read(o, "u4") for o in i.operands[1:])
        both = a.astype("u8") | b.astype("u8") << np.uint64(32)
        result = np.zeros(self.threads, np.uint32)
        for n in range(4):
            which = selector >> (4 * n) & 15
            byte = (both >> (8 * (which & 7)).astype("u8") & np.uint64(255)).astype("u4")
            byte = np.where(which & 8, np.where(byte & 128, 255, 0), byte).astype("u4")
            result |= byte << np.uint32(8 * n)
        self._write(i.operands[0], result, mask)

    def _whole_warps(self, mask: Values | None) -> Values:
        """The warps that take part; all of a warp's threads must."""
        active = np.ones(self.threads, bool) if mask is None else mask
        of_warps = active.reshape(-1, 32)
        if (of_warps.any(1) != of_warps.all(1)).any():
            raise ValueError("some threads of a warp alone")
        return of_warps.any(1)

    def _op_shfl(self, i: Instruction, mask: Values | None) -> None:
        self._whole_warps(mask)
        value, by, clamp = self._read(i.operands[1], "u4"), self._read(i.operands[2], "i8"), self._read(i.operands[3], "i8")
        lane, segment = self.lane % 32, clamp >> 8 & 31
        lowest = lane & segment
        last = lowest | (clamp & 31 & ~segment)
        if "bfly" in i.parts:
            source, legal = lane ^ by, (lane ^ by) <= last
        elif "idx" in i.parts:
            source = lowest | (by & ~segment)
            legal = source <= last
        elif "up" in i.parts:
            source, legal = lane - by, lane - by >= last
        else:
            source, legal = lane + by, lane + by <= last
        source = np.where(legal, source, lane)
        self._write(i.operands[0].split("|")[0], value[self.lane // 32 * 32 + source], mask)

    def _op_redux(self, i: Instruction, mask: Values | None) -> None:
        self._whole_warps(mask)
        dtype = TYPES[i.parts[-1]]
        value = self._read(i.operands[1], dtype).reshape(-1, 32)
        result = {"max": np.max, "min": np.min, "add": np.sum}[i.parts[2]](value, axis=1).astype(dtype)  # type: ignore[operator]
        self._write(i.operands[0], np.repeat(result, 32), mask)

    def _op_mma(self, i: Instruction, mask: Values | None) -> None:
        warps = self._whole_warps(mask)
        shape = next(p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
        kinds = i.parts[-4:]
        to, a, b, c = i.operands
        a, b = ((r,) if isinstance(r, str) else r for r in (a, b))
        if kinds[0] == "s32":
            k = int(shape.split("k")[1])
            left = self._bytes(a, kinds[1])  # [warps, 8, 4, registers, 4]
            right = self._bytes(b, kinds[2])
            rows = np.stack([left[:, :, :, 0::2], left[:, :, :, 1::2]], 1)  # [warps, 2, 8, 4, halves of K, 4]
            rows = rows.transpose(0, 1, 2, 4, 3, 5).reshape(-1, 16, k)
            columns = right.transpose(0, 1, 3, 2, 4).reshape(-1, 8, k)
            product = np.einsum("wrk,wck->wrc", rows, columns)
        elif shape == "m16n8k16" and kinds[1] in ("f16", "bf16") and kinds[0] == "f32":
            left, right = self._halves(a, kinds[1]), self._halves(b, kinds[2])  # [warps, 8, 4, registers, 2]
            rows = np.stack([left[:, :, :, 0::2], left[:, :, :, 1::2]], 1).transpose(0, 1, 2, 4, 3, 5).reshape(-1, 16, 16)
            columns = right.transpose(0, 1, 3, 2, 4).reshape(-1, 8, 16)
            product = np.einsum("wrk,wck->wrc", rows.astype("f8"), columns.astype("f8"))
        else:
            raise NotImplementedError(i.text)
        dtype = "i4" if kinds[0] == "s32" else "f4"
        product = product.reshape(-1, 2, 8, 4, 2)  # [warps, row / 8, row % 8, column / 2, column % 2]
        for n, register in enumerate(to):
            of = product[:, n // 2, :, :, n % 2].reshape(-1)
            self._write(register, (of + self._read(c[n], dtype)).astype(dtype), np.repeat(warps, 32) if mask is not None else None)

    def _bytes(self, registers: tuple[str, ...], kind: str) -> Values:
        words = np.stack([self._read(r, "u4") for r in registers], 1)
        return np.ascontiguousarray(words).view(TYPES[kind]).reshape(-1, 8, 4, len(registers), 4).astype(np.int64)

    def _halves(self, registers: tuple[str, ...], kind: str) -> Values:
        words = np.ascontiguousarray(np.stack([self._read(r, "u4") for r in registers], 1))
        values = words.view("f2").astype("f4") if kind == "f16" else (words.view("u2").astype("u4") << 16).view("f4")
        return values.reshape(-1, 8, 4, len(registers), 2)

    def _op_ldmatrix(self, i: Instruction, mask: Values | None) -> None:
        warps = self._whole_warps(mask)
        registers = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        given = self._addresses(i.operands[1]).reshape(-1, 32)
        for n, register in enumerate(registers):
            memory, at = self._space(("shared",), given[:, 8 * n : 8 * n + 8].reshape(-1), 16, np.repeat(warps, 8))
            found = np.zeros((warps.size, 8, 8), np.uint16)
            found[warps] = memory[at[:, None] + np.arange(16)].reshape(-1).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                found = found.transpose(0, 2, 1)
            self._write(register, np.ascontiguousarray(found).view(np.uint32).reshape(-1), mask)

    def _op_stmatrix(self, i: Instruction, mask: Values | None) -> None:
        warps = self._whole_warps(mask)
        registers = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
        given = self._addresses(i.operands[0]).reshape(-1, 32)
        for n, register in enumerate(registers):
            memory, at = self._space(("shared",), given[:, 8 * n : 8 * n + 8].reshape(-1), 16, np.repeat(warps, 8))
            value = np.ascontiguousarray(self._read(register, "u4")).view("u2").reshape(-1, 8, 8)[warps]
            value = value.transpose(0, 2, 1) if "trans" in i.parts else value
            memory[at[:, None] + np.arange(16)] = np.ascontiguousarray(value).view(np.uint8).reshape(-1, 16)

    def _nothing(self, i: Instruction, mask: Values | None) -> None:
        """What orders kernels, threads of a warp or accesses: here one follows the other."""

    _op_griddepcontrol = _op_bar = _op_fence = _op_membar = _nothing

    def _op_mul(self, i: Instruction, mask: Values | None) -> None:
        """mul and mad: of integers the low half, the high one or all of the product."""
        dtype = TYPES[i.parts[-1]]
        values = [self._read(o, dtype) for o in i.operands[1:3]]
        addend = i.operands[3] if i.base == "mad" else None
        with np.errstate(all="ignore"):
            if dtype[0] == "f":
                result = values[0] * values[1]
            elif "wide" in i.parts:
                wider = f"{dtype[0]}{2 * int(dtype[1])}"
                result = values[0].astype(wider) * values[1].astype(wider)
                result = result if addend is None else result + self._read(addend, wider)
            elif "hi" in i.parts:
                bits = 8 * int(dtype[1])
                result = np.array([int(a) * int(b) >> bits for a, b in zip(*values, strict=True)]).astype(dtype)
            else:
                result = values[0] * values[1]
                result = result if addend is None else result + self._read(addend, dtype)
        self._write(i.operands[0], result, mask)

    _op_mad = _op_mul

    def _op_bfe(self, i: Instruction, mask: Values | None) -> None:
        """bfe: bits from a place on; of signed values the last is their sign."""
        value = self._read(i.operands[1], TYPES[i.parts[-1]])
        start, length = int(i.operands[2]), int(i.operands[3])
        kind, above = value.dtype.type, 8 * value.itemsize - start - length
        self._write(i.operands[0], value << kind(above) >> kind(above + start), mask)

    def _op_dp4a(self, i: Instruction, mask: Values | None) -> None:
        a, b = (np.ascontiguousarray(self._read(o, "u4")).view(TYPES[f"{kind[0]}8"]).reshape(-1, 4).astype(np.int64)
                for o, kind in zip(i.operands[1:3], i.parts[1:3], strict=True))  # fmt: skip
        self._write(i.operands[0], ((a * b).sum(1) + self._read(i.operands[3], "i4")).astype("i4"), mask)
