"""What a server keeps of prompts where nothing is said: a part of what is left of the device, and of the host where that is not enough."""

from __future__ import annotations

import dataclasses

import pytest

import kiln
from kiln.exporter.serve import served
from kiln.exporter.serve.settings import Settings

GIB = 1 << 30


@dataclasses.dataclass
class Loaded:
    device: str
    free_bytes: int


@pytest.mark.parametrize(
    "device, free, said, expected",
    [
        ("cpu", 20 * GIB, (None, None), (0, 3 * GIB)),
        ("cuda:0", 100 * GIB, (None, None), (16 * GIB, 0)),
        ("cuda:0", 20 * GIB, (None, None), (5 * GIB, 0)),
        ("cuda:0", 2 * GIB, (None, None), (GIB // 2, 3 * GIB)),
        ("cuda:0", 2 * GIB, (None, 7), (GIB // 2, 7)),
        ("cuda:0", 100 * GIB, (0, None), (0, 3 * GIB)),
        ("cuda:0", 100 * GIB, (5, 0), (5, 0)),
        ("cpu", 20 * GIB, (0, 0), None),
    ],
)
def test_budgets(monkeypatch, device, free, said, expected) -> None:
    made = []
    monkeypatch.setattr(kiln, "SnapshotStore", lambda *budgets: made.append(budgets) or budgets)
    monkeypatch.setattr(served.os, "sysconf", {"SC_PHYS_PAGES": 24 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert served.snapshot_store(Loaded(device, free), Settings(snapshots=said)) == expected
    assert made == ([expected] if expected else [])


def test_a_large_host(monkeypatch) -> None:
    monkeypatch.setattr(kiln, "SnapshotStore", lambda *budgets: budgets)
    monkeypatch.setattr(served.os, "sysconf", {"SC_PHYS_PAGES": 512 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert served.snapshot_store(Loaded("cpu", 0), Settings(snapshots=(None, None))) == (0, 8 * GIB)


def test_what_is_free(talking) -> None:
    model = kiln.Model(str(talking), "cpu")
    assert 1 << 20 < model.free_bytes < 1 << 50
