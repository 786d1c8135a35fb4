"""Which replica a request goes to: conversations come back to their caches, keys stay where they are, the load is even."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from kiln.exporter.serve.deploy.prefix import key, ranked


def of(**fields: object) -> str:
    return key(json.dumps(fields).encode())


def turns(count: int, user: str = "Why is the sky blue?") -> list[dict]:
    found = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
    for i in range(count):
        found += [{"role": "assistant", "content": f"answer {i}"}, {"role": "user", "content": f"and {i}?"}]
    return found


def test_a_conversation_has_one_key() -> None:
    """However long it is, whatever is asked of the answer; another one, and another salt, has another."""
    first = of(messages=turns(0), temperature=0.3)
    assert all(of(messages=turns(n), stream=True, model="x") == first for n in (1, 2, 9))
    others = [of(messages=turns(0, "And the sea?")), of(messages=turns(0), cache_salt="a"), of(messages=turns(0), tools=[{"name": "f"}]),
              of(messages=turns(0)[1:]), of(messages=turns(0)[1:], system="Be brief.")]  # fmt: skip
    assert len({first, *others}) == 6


@pytest.mark.parametrize("field", ["input", "prompt"])
def test_of_plain_prompts_the_beginning_counts(field: str) -> None:
    text = "x" * 600
    assert of(**{field: text}) == of(**{field: text + "more"}) != of(**{field: "y" + text})
    assert of(**{field: [1, 2, 3]}) != of(**{field: [1, 2, 4]})


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": 3}', b'{"messages": [1, null]}', b'{"messages": []}',
                                  b"[" * 100_000])  # fmt: skip
def test_what_is_no_request_has_a_key(body: bytes) -> None:
    assert len(key(body)) == 32


def test_replicas_that_come_and_go_move_few_keys() -> None:
    keys, names = [str(i) for i in range(2000)], [f"replica-{i}" for i in range(5)]
    first = {k: names[ranked(k, names)[0]] for k in keys}
    shares = Counter(first.values())
    assert min(shares.values()) > 300
    fewer = names[:2] + names[3:]
    moved = [k for k in keys if fewer[ranked(k, fewer)[0]] != first[k]]
    assert all(first[k] == names[2] for k in moved) and len(moved) == shares[names[2]]
    assert sorted(ranked("x", names)) == list(range(5)) and ranked("x", []) == []
    assert all(names[ranked(k, names)[1]] == fewer[ranked(k, fewer)[0]] for k in moved)  # who is asked next is who has it then
