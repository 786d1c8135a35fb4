"""What a file is that is no GGUF language model: told by its first bytes, or by the metadata of a GGUF file of another kind."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROBE = 512  # bytes read from the start of a file
_AGAIN = "download the .gguf file itself"
_MAGIC: tuple[tuple[bytes, str], ...] = (  # first bytes -> what it is and what to do
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file it points to; fetch it with git lfs pull"),
    (b"PK\x03\x04", f"a zip archive (or a PyTorch checkpoint); unpack it, or {_AGAIN}"),
    (b"PK\x05\x06", f"an empty zip archive; {_AGAIN}"),
    (b"\x1f\x8b", "compressed with gzip; unpack it with gunzip first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it with unzstd first"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it with unxz first"),
    (b"BZh", "compressed with bzip2; unpack it with bunzip2 first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x80\x02", f"a Python pickle (a PyTorch checkpoint); {_AGAIN}"),
    (b"lmgg", "an unversioned GGML file, older than GGUF; convert the original model again"),
    (b"fmgg", "a GGMF file, older than GGUF; convert the original model again"),
    (b"tjgg", "a GGJT file, older than GGUF; convert the original model again"),
    (b"algg", "a GGLA adapter, older than GGUF and no model; merge it into its model and convert that"),
    (b"FUGG", "a GGUF file with its bytes swapped; convert it to little-endian GGUF"),
    (b"%PDF", "a PDF document; give a .gguf file"),
    (b"\x7fELF", "a program; give a .gguf file"),
    (b"\x89HDF", f"an HDF5 file (a Keras model); {_AGAIN}"),
    (b"#!", "a script; give a .gguf file"),
)
_UNFINISHED = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".aria2", ".tmp")
# The first word of `general.architecture`, or of a metadata key, of files that hold something else than a language model.
_OTHER = {
    "clip": "a vision or audio projector (mmproj)",
    "mmproj": "a vision or audio projector (mmproj)",
    "whisper": "a Whisper speech model",
    "imatrix": "an importance matrix (imatrix), made for quantizing",
    "controlvector": "a control vector",
    "adapter": "a LoRA adapter",
    "sd": "an image model", "sdxl": "an image model", "flux": "an image model", "wan": "a video model",
    "bert": "a text embedding model (BERT)", "nomic-bert": "a text embedding model (BERT)", "t5encoder": "a text encoder (T5)",
    "wavtokenizer-dec": "an audio decoder", "gemma-embedding": "a text embedding model",
    "gemma4-assistant": "a drafter, which guesses tokens for a larger model",
}  # fmt: skip
_TYPES = {"adapter": _OTHER["adapter"], "mmproj": _OTHER["mmproj"], "projector": _OTHER["mmproj"], "imatrix": _OTHER["imatrix"],
          "vocab": "a vocabulary alone, without weights"}  # of `general.type`  # fmt: skip


def foreign(head: bytes, size: int, path: Path) -> str:
    """What a file that does not begin with b"GGUF" is, and what to do: the end of an error line."""
    if path.suffix.lower() in _UNFINISHED:
        return f"it looks like an unfinished download (it ends in {path.suffix}); wait for it, or download it again"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"it is {what}"
    if len(head) >= 9 and 2 <= struct.unpack_from("<Q", head)[0] <= size - 8 and head[8:9] == b"{":
        return "it is a safetensors file; convert the model to GGUF first (llama.cpp's convert_hf_to_gguf.py), or download it as GGUF"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return "it is a web page: the download was answered with HTML; download the file again, logged in if the model is gated"
    if text.startswith((b"{", b"[")) and head.isascii():
        return "it is JSON text, maybe an error message of the server or a model's config.json; give the .gguf file"
    if head and not head.strip(b"\0"):
        return "it begins with zeros: an unfinished or lost download; download it again"
    if len(head) >= 8 and _old_imatrix(head):
        return f"it is {_OTHER['imatrix']}; give the model itself"
    if head and all(c in b"\t\r\n\f\x1b" or 32 <= c < 127 for c in head):
        line = head[:40].decode().splitlines()[0]
        return f"it is text that begins with {line!r}; give a .gguf file"
    return f"it starts with {head[:4]!r} instead of b'GGUF'; give a .gguf file"


def _old_imatrix(head: bytes) -> bool:
    """llama.cpp's former imatrix.dat: int32 entries, then of each int32 length, name."""
    entries, length = struct.unpack_from("<ii", head)
    name = head[8 : 8 + max(0, length)]
    return 0 < entries < 1 << 20 and 4 < length < 256 and name.isascii() and name.startswith((b"blk.", b"output", b"token"))


def other_model(metadata: Mapping[str, Any]) -> str | None:
    """What a GGUF file holds that is no language model, None for one that may be."""
    general_type, architecture = (str(metadata.get(f"general.{key}", "")).lower() for key in ("type", "architecture"))
    if general_type in _TYPES:
        return _TYPES[general_type]
    if architecture in _OTHER or "bert" in architecture:
        return _OTHER.get(architecture, _OTHER["bert"])
    if not architecture:
        first = {key.split(".", 1)[0] for key in metadata}
        return next((what for word, what in _OTHER.items() if word in first), None)
    return None
