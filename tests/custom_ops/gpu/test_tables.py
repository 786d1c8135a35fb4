"""Which architecture's kernel configuration a target takes."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch

from kiln import custom_ops
from kiln.custom_ops.gpu import tables, target
from kiln.custom_ops.gpu.tables import borrowed, nearest, pick
from kiln.custom_ops.gpu.target import KIB, MIB, gpu_targets
from kiln.custom_ops.tq4 import prefill
from tests.conftest import kiln
from tests.exporter.test_cli import TINY

TARGETS = gpu_targets()
SMS = {t.sm for t in TARGETS.values()}
TABLES = {f"{module}.{name}": getattr(importlib.import_module(f"kiln.custom_ops.{module}"), name) for module, name in tables.TABLES}


@pytest.mark.parametrize(
    ("architectures", "name", "expected"),
    [
        ((80, 86, 90, 100), "sm_90", 90),  # its own
        ((80, 86, 90, 100), "sm_89", 86),  # the nearest older one
        ((80, 86, 90), "sm_100", 90),
        ((90, 100), "sm_80", 90),  # there is no older one
        ((86, 90, 100), "sm_120", 86),  # the nearer ones take more shared memory than it has
        ((86, 90), "sm_80", 86),
        ((90, 100), "sm_120", 100),  # all of them do
        ((90,), "sm_86", 90),
    ],
)
def test_nearest(architectures, name, expected):
    assert nearest(architectures, TARGETS[name]) == nearest(reversed(architectures), TARGETS[name]) == expected


def test_pick():
    table = {(86, 256): "small", (86, 512): "large", (90, 256): "own"}
    assert [pick(table, TARGETS["sm_90"], dim) for dim in (64, 256, 512)] == ["own", "own", "large"]
    assert [pick(table, TARGETS["sm_120"], dim) for dim in (256, 257)] == ["small", "large"]
    with pytest.raises(ValueError, match="no kernel configuration for head dimension 1024; the largest is 512"):
        pick(table, TARGETS["sm_90"], 1024)


def test_an_architecture_that_is_not_listed_takes_the_nearest():
    unlisted = dataclasses.replace(TARGETS["sm_100"], sm=103)
    assert nearest((80, 90, 100, 120), unlisted) == 100
    assert nearest((80, 86, 90), dataclasses.replace(TARGETS["sm_86"], sm=87, smem_optin=163 * KIB)) == 86


def test_every_table_has_something_for_every_target_within_its_shared_memory():
    listed = {t.sm: t for t in TARGETS.values()}
    for name, table in TABLES.items():
        if name.startswith("weights.gemv."):  # no shared memory to speak of
            assert {key if isinstance(key, int) else key[0] for key in table} <= set(listed)
            continue
        keys = [key if isinstance(key, tuple) else (key, 0) for key in table]
        for dim in {dim for _, dim in keys}:
            architectures = [sm for sm, d in keys if d == dim]
            for t in TARGETS.values():
                assert listed[nearest(architectures, t)].smem_optin <= t.smem_optin, (name, dim, t.name)


def test_what_is_borrowed_is_named():
    taken = borrowed(TARGETS["sm_89"])
    assert set(taken) <= {86, 90} and set(taken[86]) == {
        "attention.flash.DECODE_TILES [256]", "attention.flash.DECODE_TILES [512]",
        "attention.flash.PREFILL_TILES [256]", "attention.flash.PREFILL_TILES [512]",
        "attention.sliding_cut.SLIDING_TILES [256]", "attention.sliding_cut.SLIDING_TILES [512]", "tq4.attention.DECODE_TILES [512]",
        "weights.matmul.TILES",
    }  # fmt: skip
    assert borrowed(TARGETS["sm_90"]) == {}


def test_every_table_of_head_dimensions_is_listed():
    """What is not listed is neither borrowed nor missed with a word: every module-level table by (architecture, head dimension)."""
    for module in pkgutil.walk_packages(custom_ops.__path__, "kiln.custom_ops."):
        for name, value in vars(importlib.import_module(module.name)).items() if not module.name.endswith("__main__") else ():
            if isinstance(value, dict) and value and all(isinstance(k, tuple) and len(k) == 2 and k[0] in SMS for k in value):
                assert any(value is table for table in TABLES.values()), f"{module.name}.{name}"
    assert {sm for sm, _ in prefill.PIECE_TILES} == SMS, "prefill over TQ4 has an entry of its own for every architecture"


def test_what_a_table_lacks():
    needed = {"attention.flash.DECODE_TILES": {64, 512, 576}, "tq4.prefill.PIECE_TILES": {512}}
    assert tables.lacking(needed) == ["attention.flash.DECODE_TILES [576]"]
    with pytest.raises(ValueError, match="tq4.prefill.TILES is not among the tables"):
        tables.lacking({"tq4.prefill.TILES": {64}})


def test_the_export_says_so_once(tmp_path):
    command = ("export", "--gguf", TINY, "--out", tmp_path / "out", "--dry-run", "--target")
    notes = [line for line in kiln(*command, "sm_90", "--target", "sm_89").stderr.splitlines() if "note:" in line]
    assert sum("sm_86" in line for line in notes) == 1 and all(line.startswith("note: sm_89 has no") for line in notes)
    assert "attention.flash.DECODE_TILES [256]" in next(line for line in notes if "sm_86" in line)
    assert "note:" not in kiln(*command, "cpu").stderr


@pytest.fixture
def device(monkeypatch):
    """A GPU, as far as its properties go."""
    properties = SimpleNamespace(
        major=9, minor=0, name="GPU", multi_processor_count=7, max_threads_per_multi_processor=1536, L2_cache_size=MIB,
        shared_memory_per_block_optin=99 * KIB, shared_memory_per_multiprocessor=100 * KIB, total_memory=1 << 30,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    target._present.cache_clear()
    yield properties
    target._present.cache_clear()


def test_the_gpu_of_this_machine(device):
    assert target.current_target() == TARGETS["sm_90"]


def test_a_gpu_that_is_not_listed_is_what_it_says(device):
    device.minor = 9
    found = target.current_target()
    assert (found.sm, found.sm_count, found.smem_optin, found.l2) == (99, 7, 99 * KIB, MIB)
