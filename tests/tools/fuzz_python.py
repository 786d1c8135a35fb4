"""Hostile input for the Python side: python3 -m tests.tools.fuzz_python [--seconds 60] [--target gguf] [--save tests/corpus/gguf]

Each target draws inputs with Hypothesis and checks that the answer is a result or a KilnError, within a bound of time; anything else
ends the run with exit code 1 and, for GGUF files, is saved. FUZZ_SECONDS is the time of each target.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.errors import KilnError
from kiln.exporter.source.chat import render_chat
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import ReadOptions, read_plan, survey
from kiln.exporter.source.tokenizer import read_tokenizer
from kiln.exporter.tools.synth import write_synthetic

CPU_SECONDS = 10.0  # of one input; the largest legal one takes a twentieth
MEMORY = 12 << 30  # of address space: more is a MemoryError, which is a finding
ODD = (0, 1, 2, 3, 7, 31, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


# ---- GGUF files as records that can be spoiled one by one ----


@dataclass(frozen=True)
class Raw:
    """A GGUF file: keys (name, type, encoded value), tensors (name, dims, type, offset), and the tensor data."""

    keys: tuple[tuple[bytes, int, bytes], ...]
    tensors: tuple[tuple[bytes, tuple[int, ...], int, int], ...]
    data: bytes = field(repr=False)
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)  # in place of the true numbers of tensors and keys

    def encode(self) -> bytes:
        n_tensors, n_keys = self.counts
        out = [b"GGUF", struct.pack("<I", self.version & 0xFFFFFFFF), _u64(len(self.tensors) if n_tensors is None else n_tensors)]
        out.append(_u64(len(self.keys) if n_keys is None else n_keys))
        for name, kind, value in self.keys:
            out += [_u64(len(name)), name, struct.pack("<I", kind & 0xFFFFFFFF), value]
        for name, dims, kind, offset in self.tensors:
            out += [_u64(len(name)), name, struct.pack("<I", len(dims)), *map(_u64, dims)]
            out += [struct.pack("<I", kind & 0xFFFFFFFF), _u64(offset)]
        header = b"".join(out)
        return header + bytes(-len(header) % 32) + self.data


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value & 2**64 - 1)


@functools.cache
def base() -> Raw:
    """Two layers of a small model, all types of tensors in it, and a tokenizer."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.gguf"
        write_synthetic(path, "tiny", "q4_k_m", 0, layers=2)
        file = open_gguf(path)
        start = min(t.offset for t in file.tensors.values())
        keys = tuple((key.encode(), *file.metadata.raw(key)) for key in file.metadata)
        tensors = tuple((t.name.encode(), t.shape[::-1], t.ggml_type, t.offset - start) for t in file.tensors.values())
        return Raw(keys, tensors, path.read_bytes()[start:])


@st.composite
def spoiled(draw: Any) -> bytes:
    """A GGUF file with one to three things wrong."""
    raw = base()
    numbers = st.sampled_from(ODD) | st.integers(0, 2**64 - 1)
    names = st.binary(max_size=40) | st.text(max_size=20).map(str.encode)
    names |= st.sampled_from([t[0] for t in raw.tensors] + [k[0] for k in raw.keys])
    cut: Callable[[bytes], bytes] = bytes
    for _ in range(draw(st.integers(1, 3))):
        keys, tensors = list(raw.keys), list(raw.tensors)
        k, t = draw(st.integers(0, len(keys) - 1)), draw(st.integers(0, len(tensors) - 1))
        what = draw(st.integers(0, 13) | st.just(7))
        name, dims, kind, offset = tensors[t]
        if what == 0:
            tensors[t] = (draw(names), dims, kind, offset)
        elif what == 1:
            dims = draw(st.lists(numbers, max_size=6)) if draw(st.booleans()) else [*dims[:-1], draw(numbers)]
            tensors[t] = (name, tuple(dims), kind, offset)
        elif what == 2:
            tensors[t] = (name, dims, draw(st.integers(0, 45) | numbers), offset)
        elif what == 3:
            tensors[t] = (name, dims, kind, draw(st.sampled_from([x[3] for x in tensors]) | numbers))
        elif what == 4:
            keys[k] = (draw(names), *keys[k][1:])
        elif what == 5:
            keys[k] = (keys[k][0], draw(st.integers(0, 14) | numbers), keys[k][2])
        elif what == 6:
            keys[k] = (*keys[k][:2], draw(st.binary(max_size=64)))
        elif what == 7:  # a well-formed value of any type and form
            keys[k] = (keys[k][0], *_value(draw))
        elif what == 8:
            raw = replace(raw, counts=(draw(numbers), raw.counts[1]) if draw(st.booleans()) else (raw.counts[0], draw(numbers)))
        elif what == 9:
            del keys[k]
        elif what == 10:
            del tensors[t]
        elif what == 11:
            keys.append(keys[k]) if draw(st.booleans()) else tensors.append(tensors[t])
        elif what == 12:
            at, patch = draw(st.integers(0, len(raw.data) - 64)), draw(st.binary(min_size=1, max_size=64) | st.just(b"\xff" * 64))
            raw = replace(raw, data=raw.data[:at] + patch + raw.data[at + len(patch) :])
        else:
            size, at, patch = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.binary(max_size=9))
            cut = functools.partial(_damage, size=size, at=at, patch=patch)
        raw = replace(raw, keys=tuple(keys), tensors=tuple(tensors))
    return cut(raw.encode())


def _damage(data: bytes, size: float, at: float, patch: bytes) -> bytes:
    """Cut to a share of the header or of the file, and overwritten somewhere in the header."""
    header = len(data) - len(base().data)
    position = int(at * header)
    data = data[:position] + patch + data[position + len(patch) :]
    return data if size > 0.8 else data[: int(size * 2 * header)] if size < 0.4 else data[: int(size * len(data))]


def _value(draw: Any) -> tuple[int, bytes]:
    kinds = {"UINT8": "B", "INT8": "b", "UINT32": "I", "INT32": "i", "FLOAT32": "f", "BOOL": "?", "UINT64": "Q", "FLOAT64": "d"}
    kind = draw(st.sampled_from(sorted(kinds)) | st.just("STRING"))
    items: list[bytes] = []
    for _ in range(draw(st.integers(1, 3) | st.just(2))):
        if kind == "STRING":
            text = draw(st.text(max_size=20)).encode()
            items.append(_u64(len(text)) + text)
        else:
            size = struct.calcsize(kinds[kind])
            small = struct.pack(f"<{kinds[kind]}", draw(st.integers(0, 100)))
            items.append(draw(st.just(small) | st.binary(min_size=size, max_size=size)))
    number = int(GGUFValueType[kind])
    array = struct.pack("<IQ", number, len(items)) + b"".join(items)
    return (number, items[0]) if draw(st.booleans()) else (int(GGUFValueType.ARRAY), array)


# ---- targets: each takes one input and raises on a finding ----


def check_gguf(data: bytes) -> None:
    """Read, planned and packed, or refused in one line by all three ways."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.gguf"
        path.write_bytes(data)
        try:
            found = survey(path, ReadOptions(scan=True))
        except KilnError as e:
            _one_line(e)
            return
        for problem in found.problems:
            _one_line(problem)
        if found.plan is None:
            try:
                read_plan(path, ReadOptions(scan=True))
            except KilnError as e:
                _one_line(e)
                return
            raise AssertionError("a plan without problems is None")
        write_weights(Path(directory) / "w", found.plan)
        if found.tokenizer:
            found.tokenizer.write(Path(directory) / "t.json")


def _one_line(error: object) -> None:
    text = str(error)
    assert "\n" not in text and 10 < len(text) < 4000, text[:400]


_TEXTS = st.sampled_from(["a", "b", "ab", "", "<0x41>", "<bos>", "<turn|>", "\u2581", " ", "\n", "<|im_end|>"]) | st.text(max_size=6)
_NUMBERS = st.integers(-2, 300) | st.floats() | st.booleans() | st.sampled_from(ODD)


@st.composite
def tokenizers(draw: Any) -> dict[str, Any]:
    """Tokenizer metadata, sound or spoiled."""
    tokens = draw(st.lists(_TEXTS, max_size=12))  # the bytes follow in `check_tokenizer`: failures stay readable
    p = "tokenizer.ggml."
    types = draw(st.lists(st.integers(1, 6), min_size=len(tokens), max_size=len(tokens)))
    merges = draw(st.lists(st.builds("{} {}".format, _TEXTS, _TEXTS), max_size=4))
    metadata: dict[str, Any] = {f"{p}model": "gemma4", f"{p}tokens": tokens, f"{p}token_type": types, f"{p}merges": merges}
    for name in ("bos", "eos", "eot", "unknown"):
        if draw(st.booleans()):
            metadata[f"{p}{name}_token_id"] = draw(st.integers(0, len(tokens) + 255) | _NUMBERS | st.lists(_NUMBERS, max_size=3))
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(metadata)) | st.text(max_size=8).map(lambda t: p + t))
        metadata[key] = draw(st.none() | _TEXTS | _NUMBERS | st.lists(_TEXTS | _NUMBERS, max_size=4))
    return metadata


def check_tokenizer(metadata: dict[str, Any]) -> None:
    """A tokenizer.json that the runner loads and that keeps every text, or one line. The runner is asked where it is built."""
    for name, added in (("tokens", [f"<0x{b:02X}>" for b in range(256)]), ("token_type", [6] * 256)):
        value = metadata[f"tokenizer.ggml.{name}"]
        metadata = metadata | {f"tokenizer.ggml.{name}": value + added if isinstance(value, list) else value}
    try:
        tokenizer = read_tokenizer(metadata)
    except KilnError as e:
        _one_line(e)
        return
    if tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "t.json"
        tokenizer.write(path)
        import kiln

        loaded = kiln.Tokenizer(str(path))
        for i, text in enumerate(tokenizer.tokens):
            if tokenizer.types[i] != 6 and not text.startswith("<0x"):
                spaced = text.replace("\u2581", " ")
                kept = (text, spaced) if tokenizer.is_special(i) else (spaced,)
                assert loaded.decode([i], skip_special=False) in kept, (i, text)
        for text in tokenizer.tokens[:12]:
            encoded = loaded.encode(text, add_bos=False)
            decoded = loaded.decode(encoded, skip_special=False)  # U+2581 comes back as itself where its bytes were encoded
            assert decoded.replace("\u2581", " ") == text.replace("\u2581", " "), (text, encoded)


_PARTS = (
    "{{ bos_token }}", "{{ messages[0].content }}", "{{ messages[0]['content'] | trim }}", "{% for m in messages %}",
    "{% endfor %}", "{% if tools %}", "{% endif %}", "{{ 1 / 0 }}", "{{ strftime_now('%Y') }}", "{% generation %}", "{% endgeneration %}",
    "{% set x = 'a' %}", "{{ x * 10 ** 9 }}", "{{ x }}", "{% macro f(n) %}", "{% endmacro %}", "{{ f(3) }}",
    "{{ messages | tojson }}", "{{ [] | first }}",
    "{% for i in range(30000) %}", "{{ raise_exception('no') }}", "{%- break %}", "{{ namespace(a=1).a }}", "{{ ''.__class__ }}", "{{",
    "%}", "{# c #}", "{{ '%s' % messages }}", "{{ messages[9] }}", "{{ {}.items() }}", "{{ '{0.__class__}'.format(x) }}", "\n", "text",
)  # fmt: skip
templates = st.lists(st.sampled_from(_PARTS) | st.text(max_size=8), max_size=8).map("".join)


def check_template(template: str) -> None:
    try:
        chat = render_chat(template.encode("utf-8", "replace").decode(), {"bos_token": "<bos>"})
    except KilnError as e:
        _one_line(e)
        return
    assert len(chat.prefix) + len(chat.suffix) < 1 << 20


def check_text(data: bytes) -> None:
    """--text of `kiln eval`: UTF-8 text as it is, or one line."""
    from kiln.exporter.measure.evaluate import _read_text

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "t.txt"
        path.write_bytes(data)
        try:
            text = _read_text(path)
        except KilnError as e:
            _one_line(e)
            return
        assert text.encode() == data.removeprefix(b"\xef\xbb\xbf")


texts = st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | st.text(max_size=50).map(lambda t: b"\xef\xbb\xbf" + t.encode())
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "gguf": (spoiled(), check_gguf),
    "tokenizer": (tokenizers(), check_tokenizer),
    "template": (templates, check_template),
    "text": (texts, check_text),
}


def bounded(check: Callable[[Any], None], value: Any) -> None:
    """`check`, within CPU_SECONDS."""
    start = time.process_time()
    check(value)
    took = time.process_time() - start
    assert took < CPU_SECONDS, f"{took:.1f} s"


def batch(name: str, examples: int, number: int | None = None) -> int:
    """Runs a target on `examples` inputs (number: the seed) and returns how many it ran. Raises on a finding, after making it small."""
    strategy, check = TARGETS[name]
    done = 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=number is None)
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal done
        done += 1
        bounded(check, value)

    (run if number is None else seed(number)(run))()
    return done


def _seeds() -> Iterator[int]:
    yield from range(int(time.time()), 2**62)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 60)), help="of each target")
    p.add_argument("--target", choices=sorted(TARGETS), action="append")
    p.add_argument("--save", type=Path, default=Path("tests/corpus/gguf"), help="where a GGUF file that breaks the reader goes")
    a = p.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    failed = 0
    for name in a.target or TARGETS:
        start, done, small = time.monotonic(), 0, 5 if name == "template" else 50
        last: list[Any] = []
        strategy, check = TARGETS[name]

        def kept(value: Any, check: Callable[[Any], None] = check, last: list[Any] = last) -> None:
            last[:] = [value]  # after a failure Hypothesis ends with the smallest input that fails
            check(value)

        TARGETS[name] = (strategy, kept)
        try:
            for number in _seeds():
                done += batch(name, small, number)
                if time.monotonic() - start >= a.seconds:
                    break
            print(f"{name}: {done} inputs in {time.monotonic() - start:.0f} s, no finding", flush=True)
        except Exception as e:
            failed += 1
            print(f"{name}: after {done} inputs: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
            if name == "gguf" and last:
                a.save.mkdir(parents=True, exist_ok=True)
                path = a.save / f"{hashlib.sha256(last[0]).hexdigest()[:12]}.gguf"
                path.write_bytes(last[0])
                print(f"saved {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
