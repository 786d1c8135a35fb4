"""Which replica a request goes to: the one whose caches hold most of its prompt, as far as a hash of its beginning tells.

Rendezvous hashing: each replica gets a weight from the key and its own name, and the order of weights is the order in which replicas are
asked. A replica that comes or goes moves only the keys that it has. The load is bounded by whoever asks: one that is full is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

LENGTH = 512  # characters of the beginning that count


def key(body: bytes) -> str:
    """Of a request's body, in every interface's form: what its prompt begins with, and who may share it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return _hash(body[: 4 * LENGTH])
    beginning = [fields.get("system"), fields.get("instructions"), fields.get("tools")]
    for name in ("messages", "input", "prompt"):
        if (value := fields.get(name)) is not None:
            beginning.append(_first(value))
            break
    return _hash(json.dumps([fields.get("cache_salt"), *beginning], sort_keys=True)[: 8 * LENGTH].encode())


def _first(value: Any) -> Any:
    """Of messages those up to the first of the user, which later turns of a conversation have in common; of text or ids the beginning."""
    if isinstance(value, str):
        return value[:LENGTH]
    if not isinstance(value, list):
        return None
    if not value or not isinstance(value[0], dict):
        return value[:LENGTH]
    end = next((i for i, m in enumerate(value) if isinstance(m, dict) and m.get("role") == "user"), len(value) - 1)
    return [(m.get("role"), json.dumps(m.get("content"), sort_keys=True)[:LENGTH]) for m in value[: end + 1] if isinstance(m, dict)]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def ranked(key: str, names: Sequence[str]) -> list[int]:
    """Numbers of the replicas, the one that the key belongs to first."""
    weights = [hashlib.blake2b(name.encode(), key=key.encode(), digest_size=8).digest() for name in names]
    return sorted(range(len(names)), key=lambda i: weights[i], reverse=True)
