"""The ordered list of passes, and the loop that runs and verifies them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.export import ExportedProgram

from kiln.passes import chain, chunked_lm_head, free_kv_buffers, fuse_decode, index_copy, kv_len, own_matmul, packed_linear, turboquant
from kiln.passes.edit import PassError, finish
from kiln.passes.records import UNFUSED, Expected, Lowered, PassOptions, PassReport
from kiln.passes.verifier import Known, verify

Pass = Callable[[Lowered, PassOptions], PassReport]

PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("index_copy", index_copy.run),
    ("turboquant", turboquant.run),
    ("kv_len", kv_len.run),
    ("chunked_lm_head", chunked_lm_head.run),
    ("fuse_decode", fuse_decode.run),
    ("chain", chain.run),
    ("own_matmul", own_matmul.run),
    ("packed_linear", packed_linear.run),
    ("free_kv_buffers", free_kv_buffers.run),
)


def run_pipeline(
    program: ExportedProgram,
    options: PassOptions,
    dump: Path | None = None,
    after: Callable[[str, ExportedProgram], None] | None = None,
    expected: Expected | None = None,
) -> Lowered:
    """Run every pass in order, in place. `dump`: a directory for the text of the graph after each; `after`: called after each (tests).

    Raises PassError where a pass fails, or rewrites other places than are `expected` and options do not allow it.
    """
    lowered = Lowered(program)
    known: Known = {}
    verify(program, "export", known)
    _dump(program, dump, 0, "export")
    for i, (name, run) in enumerate(PIPELINE, 1):
        report = run(lowered, options)
        finish(program)
        try:
            verify(program, name, known)
        except PassError as e:
            raise PassError(f"after pass {name}: {e}") from e
        if expected is not None:
            _compare(report, expected.get(name, {}), options)
        lowered.reports.append(report)
        _dump(program, dump, i, name)
        if after:
            after(name, program)
    return lowered


def _compare(report: PassReport, expected: dict[str, str], options: PassOptions) -> None:
    report.expected = len(expected)
    report.missed = tuple(place + (f" ({why})" if why else "") for place, why in expected.items() if place not in report.places)
    if unknown := set(report.places) - set(expected):
        raise PassError(f"pass {report.name} rewrote {', '.join(sorted(unknown))}, which the model is not expected to have")
    if report.missed and not options.allow_unfused:
        raise PassError(f"{report.shortfall}; {UNFUSED}")


def _dump(program: ExportedProgram, directory: Path | None, index: int, name: str) -> None:
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{index}_{name}.txt").write_text(program.graph_module.print_readable(print_output=False))
