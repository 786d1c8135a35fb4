"""A lean reader of GGUF version 3: the file is memory-mapped, metadata arrays stay raw until asked for, tensor data is never copied.

A file is hostile until it is read: whatever its bytes are, the result or a KilnError comes in time and memory bounded by the limits below.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from kiln.exporter.errors import KilnError
from kiln.exporter.source.identify import PROBE, foreign

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {  # value type -> little-endian numpy dtype
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DTYPES = {value_type: np.dtype(code) for value_type, code in _SCALARS.items()}
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)?$", re.IGNORECASE)
MAX_DIMS = 4
MAX_PARTS = 9999
MAX_TEXT = 64 << 20  # bytes of one string
MAX_ITEMS = 1 << 24  # of an array of strings, or of one that is decoded: 30 times the largest vocabulary's merges


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.

    shape: in PyTorch order, rows first. type: GGML name such as "Q4_K", or "type 77" when the number is unknown (nbytes is then 0).
    file: index of the part it is in. offset: bytes from the start of that part.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    ggml_type: int
    nbytes: int
    file: int
    offset: int


@dataclass(frozen=True)
class _Value:
    """Where a metadata value lies: bytes start .. end of the file. count is None for a scalar."""

    value_type: GGUFValueType  # of the scalar, or of the array's items
    count: int | None
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """Key-value metadata. Arrays are decoded to a list each time they are asked for; `length` and `in` decode nothing.

    consulted: every key that was asked for by name, there or not: what has been made of the file depends on these.
    """

    def __init__(self, part: _Part):
        self._part = part
        self.consulted: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.consulted.add(key)
        return self._part.decode(key)

    def __contains__(self, key: object) -> bool:
        self.consulted.add(str(key))
        return key in self._part.values

    def __iter__(self) -> Iterator[str]:
        return iter(self._part.values)

    def __len__(self) -> int:
        return len(self._part.values)

    def length(self, key: str) -> int | None:
        """Items of an array value; None for a scalar or an absent key."""
        self.consulted.add(key)
        value = self._part.values.get(key)
        return None if value is None else value.count

    def raw(self, key: str) -> tuple[int, bytes]:
        """The value type number and the value's encoding as it stands in the file (for an array: item type, count, items)."""
        value = self._part.values[key]
        if value.count is None:
            return int(value.value_type), self._part.map[value.start : value.end]
        return int(GGUFValueType.ARRAY), self._part.map[value.start - 12 : value.end]


class _Part:
    """One file of the (possibly split) model: mapped, header parsed."""

    def __init__(self, path: Path, index: int):
        self.path, self.index = path, index
        try:
            with open(path, "rb") as f:
                head = f.read(PROBE)
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise KilnError(f"{path}: cannot read the GGUF file: {e.strerror}; check the path and its permissions") from e
        except ValueError as e:  # mmap refuses an empty file
            raise KilnError(f"{path}: the file is empty, not a GGUF file; download it again") from e
        self.size = len(self.map)
        self.values: dict[str, _Value] = {}
        self.tensors: list[TensorInfo] = []
        if not head.startswith(b"GGUF"):
            raise KilnError(f"{path}: not a GGUF file: {foreign(head, self.size, path)}")
        self._at = 4
        self._what = "the header"
        try:
            self._parse()
        except struct.error as e:
            raise self._truncated() from e

    def _truncated(self) -> KilnError:
        return KilnError(f"{self.path}: truncated at {self._what} (byte {self._at} of {self.size}); download the file again")

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self.map, self._at)
        self._at += 4
        return value

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self.map, self._at)
        self._at += 8
        return value

    def _skip(self, nbytes: int) -> int:
        """Passes over `nbytes` and returns where they start."""
        start = self._at
        if nbytes > self.size - start:
            raise self._truncated()
        self._at = start + nbytes
        return start

    def _too_large(self, what: str) -> KilnError:
        return KilnError(f"{self.path}: {what}, more than any model has; the file is damaged, download it again")

    def _string(self) -> str:
        length = self._u64()
        if MAX_TEXT < length <= self.size:
            raise self._too_large(f"{self._what} has a text of {length} bytes")
        start = self._skip(length)
        return self._decode_text(start, self._at)

    def _decode_text(self, start: int, end: int) -> str:
        try:
            return self.map[start:end].decode()
        except UnicodeDecodeError as e:
            raise KilnError(f"{self.path}: text at byte {start} is not UTF-8 ({e.reason}); the file is damaged, download it again") from e

    def _parse(self) -> None:
        version = self._u32()
        if version != 3:
            swapped = version & 0xFFFFFF == 0 and version >> 24 in (1, 2, 3)
            hint = "it is big-endian" if swapped else f"its version is {version}"
            raise KilnError(f"{self.path}: unsupported GGUF file: {hint}; convert it to little-endian GGUF version 3")
        n_tensors, n_values = self._u64(), self._u64()
        for i in range(n_values):
            self._what = f"metadata entry {i} of {n_values}"
            key = self._string()
            self._what = f"the metadata value of {key}"
            if key in self.values:
                raise KilnError(f"{self.path}: metadata key {key} appears twice; the file is damaged, convert it again")
            self.values[key] = self._value(key)
        align = self.decode("general.alignment") if "general.alignment" in self.values else 32
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise KilnError(f"{self.path}: general.alignment is {align}, which is no power of two; convert the file again")
        raw = [self._tensor_info(i, n_tensors) for i in range(n_tensors)]
        data = -(-self._at // align) * align
        for name, shape, number, offset in raw:
            self.tensors.append(self._tensor(name, shape, number, data, offset, align))
        by_offset = sorted((t for t in self.tensors if t.nbytes), key=lambda t: t.offset)
        for a, b in zip(by_offset, by_offset[1:], strict=False):
            if a.offset + a.nbytes > b.offset:
                raise KilnError(f"{self.path}: tensors {a.name} and {b.name} overlap; the file is damaged, download it again")

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._u32()
        try:
            return GGUFValueType(number)
        except ValueError as e:
            raise KilnError(f"{self.path}: metadata key {key} has unknown value type {number}; the file is damaged or too new") from e

    def _value(self, key: str) -> _Value:
        value_type, count = self._value_type(key), None
        if value_type == GGUFValueType.ARRAY:
            value_type, count = self._value_type(key), self._u64()
            if value_type == GGUFValueType.ARRAY:
                raise KilnError(f"{self.path}: metadata key {key} is an array of arrays, which is not supported")
        start = self._at
        if value_type == GGUFValueType.STRING:
            if count is not None and MAX_ITEMS < count <= self.size // 8:
                raise self._too_large(f"metadata key {key} has {count} texts")
            at, unpack, data = start, _U64.unpack_from, self.map
            for _ in range(1 if count is None else count):  # the length of each string is only known by walking
                at += 8 + unpack(data, at)[0]
                if at > self.size:
                    raise self._truncated()
            self._at = at
        else:
            self._skip(_DTYPES[value_type].itemsize * (1 if count is None else count))
        return _Value(value_type, count, start, self._at)

    def decode(self, key: str) -> Any:
        """The value of `key`: int, float, bool, str, or a list of one of them. Raises KeyError."""
        value = self.values[key]
        if (value.count or 0) > MAX_ITEMS:
            raise self._too_large(f"metadata key {key} has {value.count} values")
        if value.end - value.start > MAX_TEXT and value.count is None:
            raise self._too_large(f"metadata key {key} has a text of {value.end - value.start} bytes")
        if value.value_type != GGUFValueType.STRING:
            items = np.frombuffer(self.map, _DTYPES[value.value_type], 1 if value.count is None else value.count, value.start).tolist()
            return items[0] if value.count is None else items
        at, texts = value.start, []
        for _ in range(1 if value.count is None else value.count):
            end = at + 8 + _U64.unpack_from(self.map, at)[0]
            texts.append(self._decode_text(at + 8, end))
            at = end
        return texts[0] if value.count is None else texts

    def _tensor_info(self, i: int, count: int) -> tuple[str, tuple[int, ...], int, int]:
        self._what = f"tensor info {i} of {count}"
        name = self._string()
        dims = self._u32()
        if not 1 <= dims <= MAX_DIMS:
            raise KilnError(f"{self.path}: tensor {name} has {dims} dimensions, 1 to {MAX_DIMS} expected; the file is damaged")
        shape = tuple(self._u64() for _ in range(dims))[::-1]
        return name, shape, self._u32(), self._u64()

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, data: int, offset: int, align: int) -> TensorInfo:
        if offset % align:
            raise KilnError(f"{self.path}: tensor {name} is misaligned: offset {offset} is no multiple of {align}; the file is damaged")
        try:
            block_type = GGMLQuantizationType(number)
        except ValueError:
            return TensorInfo(name, shape, f"type {number}", number, 0, self.index, data + offset)
        block, size = GGML_QUANT_SIZES[block_type]
        if shape[-1] % block:
            raise KilnError(
                f"{self.path}: tensor {name} has rows of {shape[-1]} elements, no multiple of the {block} of a {block_type.name} block; "
                "the file is damaged"
            )
        nbytes = prod(shape) // block * size
        if data + offset + nbytes > self.size:
            raise KilnError(
                f"{self.path}: truncated: tensor {name} ends at byte {data + offset + nbytes}, the file has {self.size}; download it again"
            )
        return TensorInfo(name, shape, block_type.name, number, nbytes, self.index, data + offset)


class GGUFFile:
    """An open GGUF model. `path` is the file that was asked for; all parts of a split model are merged.

    consulted: tensors whose bytes were asked for.
    """

    def __init__(self, path: Path, parts: list[_Part]):
        self.path = path
        self._parts = parts
        self.consulted: set[str] = set()
        self.metadata = Metadata(parts[0])
        self.tensors: dict[str, TensorInfo] = {}
        self.files = [part.path for part in parts]
        for part in parts:
            for tensor in part.tensors:
                if tensor.name in self.tensors:
                    raise KilnError(f"{part.path}: tensor {tensor.name} appears twice; the file is damaged, convert it again")
                self.tensors[tensor.name] = tensor

    def _known(self, name: str) -> TensorInfo:
        info = self.tensors[name]
        if info.type.startswith("type "):
            raise KilnError(f"{self.path}: tensor {name} has the unknown GGML {info.type}; convert the file to a known type")
        return info

    def data(self, name: str) -> np.ndarray:
        """The tensor's bytes as they are in the file: uint8 [rows, row bytes], a read-only view of the mapping."""
        self.consulted.add(name)
        info = self._known(name)
        rows = prod(info.shape[:-1])
        flat = np.frombuffer(self._parts[info.file].map, np.uint8, info.nbytes, info.offset)
        return flat.reshape(rows, info.nbytes // rows if rows else 0)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Lets the pages of bytes start:stop of a tensor leave this process's memory; they are read again when touched."""
        info = self._known(name)
        begin = (info.offset + start) & -mmap.PAGESIZE
        end = info.offset + (info.nbytes if stop is None else stop)
        if end > begin:
            self._parts[info.file].map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _absent(path: Path) -> str:
    """What may be meant by a path where there is no file."""
    text = str(path)
    bare = text.strip(" \t\r\n'\"")
    if path.is_symlink():
        return f"a link to a file that is gone ({os.readlink(path)}); download it again"
    if text.startswith(("http:/", "https:/", "hf:/", "file:/")):
        return "a URL, not a file; download it and give the file's path"
    if bare and bare != text and Path(bare).exists():
        return f"no such file, but there is {bare}: take off what stands around the name"
    if any(c in text for c in "*?[") and any(path.parent.glob(path.name)):
        return "no such file: a pattern that the shell left as it is; give one file's path"
    return "no such file; give the path of a .gguf file"


def _check_path(path: Path) -> None:
    """KilnError, with what to give instead, unless `path` is a regular file (or a link to one)."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise KilnError(f"{path}: {_absent(path)}") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL character
        raise KilnError(f"{path}: cannot read the GGUF file: {getattr(e, 'strerror', None) or e}; check the path") from e
    if stat.S_ISDIR(mode):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf") if os.access(path, os.R_OK | os.X_OK) else []
        models = [p for p in inside if not (m := _SPLIT_NAME.match(p.name)) or int(m["part"]) == 1]
        hint = f"; it holds {', '.join(str(p) for p in models[:4])}: give one of them" if models else "; give the path of a .gguf file"
        if not models and any(path.glob("*.safetensors")):
            hint = "; it holds safetensors files: convert the model to GGUF first (llama.cpp's convert_hf_to_gguf.py)"
        raise KilnError(f"{path}: a directory, not a GGUF file{hint}")
    if not stat.S_ISREG(mode):
        raise KilnError(f"{path}: a pipe or device, which cannot be mapped into memory; save the model as a file first")


def same_model(name: str, other: str) -> bool:
    """Whether two files' names are the same, or those of parts of one split model."""
    models = [match and match.group("stem", "count", "end") for match in map(_SPLIT_NAME.match, (name, other))]
    return name == other or (models[0] is not None and models[0] == models[1])


def _whole(value: Any) -> int | None:
    """A count as any number type; None for anything else."""
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 1 << 31 and value == int(value) else None


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file, or all parts of a split one given any of its parts. Raises KilnError naming what is wrong and where."""
    path = Path(path)
    _check_path(path)
    first = _Part(path, 0)
    count = _whole(first.decode("split.count")) if "split.count" in first.values else 1
    if count is None or count > MAX_PARTS:
        found = str(first.decode("split.count"))[:40]
        raise KilnError(f"{path}: split.count is {found}, a number of files was expected; the file is damaged")
    if count <= 1:
        return GGUFFile(path, [first])
    named = next((p for p in (path, path.resolve()) if (m := _SPLIT_NAME.match(p.name)) and int(m["count"]) == count), None)
    match = _SPLIT_NAME.match(named.name) if named else None
    if not named or not match:
        raise KilnError(f"{path}: part of a model split into {count} files; keep the names NAME-00001-of-{count:05d}.gguf and so on")
    parts = []
    for i in range(count):
        part_path = named.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}{match['end'] or ''}")
        if not part_path.is_file():
            raise KilnError(f"{part_path}: missing part {i + 1} of {count} of the split model; put all parts into one directory")
        part = _Part(part_path, i)
        number, parts_of = (_whole(part.decode(k)) if k in part.values else None for k in ("split.no", "split.count"))
        if number != i or parts_of != count:
            raise KilnError(f"{part_path}: says it is part {number} of {parts_of} (split.no counts from 0), expected part {i} of {count}")
        parts.append(part)
    file = GGUFFile(path, parts)
    expected = _whole(parts[0].decode("split.tensors.count")) if "split.tensors.count" in parts[0].values else len(file.tensors)
    if expected != len(file.tensors):
        raise KilnError(f"{path}: the split model has {len(file.tensors)} tensors, split.tensors.count says {expected}; a part is wrong")
    return file
