"""AOTInductor, one process for each graph and target, all entries of a target into one `model*.pt2`; no GPU and no weights needed."""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from kiln.custom_ops.gpu import contract
from kiln.custom_ops.gpu.cubin import images
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights.matmul import choosing
from kiln.exporter.compiler.host import compile_failure
from kiln.exporter.compiler.package import PackingKernel, declared_constants, write_package
from kiln.exporter.compiler.trace import DRAFT_ENTRY, GraphSpec, lower
from kiln.exporter.compiler.workers import AT_ONCE, Worker, results
from kiln.exporter.errors import KilnError
from kiln.passes import edit
from kiln.passes.records import KVBuffer, PassReport


@dataclass
class CompiledEntry:
    """One compiled graph, its library still a loose file."""

    entry: str
    library: Path
    reports: list[PassReport]
    kv: list[KVBuffer]
    constants: list[str]  # fully qualified names, weights and caches
    kernels: list[str]  # names of those on the GPU
    export_s: float
    compile_s: float
    peak_rss: int  # bytes, of the compiling process


@dataclass
class CompiledTarget:
    """`model*.pt2` for one target."""

    target: str
    path: Path
    entries: list[CompiledEntry]
    packing: list[PackingKernel]


def compile_target(
    spec: GraphSpec,
    target: str,
    out: Path,
    work: Path,
    dump: Path | None = None,
    done: Callable[[CompiledEntry], None] = lambda entry: None,
    packing: bool = False,
) -> CompiledTarget:
    """Compile all graphs for `target` ("cpu" or "sm_NN") into `out`; `work` is scratch, `done` is told of each finished graph.

    packing: on a GPU, also the kernels by which the runner packs the weights of a GGUF file.

    Raises KilnError when a compilation fails or constants were merged.
    """
    work = work.resolve()  # the compiler changes directory
    entries: list[CompiledEntry] = []
    kernels: list[PackingKernel] = []
    for some in (spec.entries[i : i + AT_ONCE] for i in range(0, len(spec.entries), AT_ONCE)):
        workers = [Worker() for _ in some]
        for worker, entry in zip(workers, some, strict=True):
            worker.start(_compile_entry, spec, entry, target, work / f"{target}-{entry}", dump)
        if packing and target != "cpu" and not kernels:
            from kiln.exporter.compiler.packing_kernel import compile_packing

            kernels = compile_packing(target, work / f"{target}-packing")  # while the workers are at it
        for found in results(workers):
            entries.append(found)
            done(found)
    _check(spec, entries)
    write_package(out, {e.entry: e.library for e in entries}, {k.record["file"]: k.image for k in kernels})
    return CompiledTarget(target, out, entries, kernels)


def _check(spec: GraphSpec, entries: list[CompiledEntry]) -> None:
    from kiln.exporter.source.weights import constants, draft_constants

    own = {c.name for c in constants(spec.config, list(spec.plan))}
    for entry in entries:
        weights, lead = own, spec.cache_lead(entry.entry)
        if entry.entry == DRAFT_ENTRY and spec.drafter:  # of its model's the embedding alone
            weights = {name for name in own if name.startswith("token_embd.")}
            weights |= {c.name for c in draft_constants(spec.drafter.config, spec.drafter.plan)}
        planned = {b.name: lead + b.shape for b in spec.caches(entry.entry)}
        if {b.name: b.shape for b in entry.kv} != planned:
            raise KilnError(f"compiling {entry.entry}: the graphs disagree about their caches")
        found, kv = set(entry.constants), set(planned)
        if len(entry.constants) != len(found) or found != weights | kv:
            wrong = sorted(found ^ (weights | kv))
            count = f"{len(entry.constants)} constants where {len(weights | kv)} were expected"
            raise KilnError(f"compiling {entry.entry}: {count}; merged, lost or unknown: {', '.join(wrong[:8])}")


def _compile_entry(spec: GraphSpec, entry: str, target: str, work: Path, dump: Path | None) -> CompiledEntry:
    """Runs in a process of its own; what a compiler raises there is told as text, since it may not be picklable."""
    try:
        return _compile(spec, entry, target, work, dump)
    except Exception as e:
        if os.environ.get("KILN_DEBUG"):
            traceback.print_exc()
        if ours := _ours(e):
            raise ours from None
        raise KilnError(f"compiling {entry} for {target}: {compile_failure(e)}") from None


def _ours(error: BaseException | None) -> KilnError | None:
    """The KilnError in `error`, which the compiler may have wrapped."""
    while error is not None and not isinstance(error, KilnError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def _compile(spec: GraphSpec, entry: str, target: str, work: Path, dump: Path | None) -> CompiledEntry:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(work / "triton")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # it would put the build machine's paths into the code
    import torch._inductor

    from kiln.exporter.compiler import torch_private

    gpu = None if target == "cpu" else gpu_targets()[target]
    device = "cpu" if gpu is None else "cuda"
    with torch_private.quiet():
        torch_private.install(gpu)
        start = time.monotonic()
        with compiling_for(gpu) if gpu else nullcontext(), choosing(spec.options.matmul):
            lowered = lower(spec, entry, device, dump)
            traced = time.monotonic()
            program = lowered.program
            args, kwargs = program.example_inputs
            files = torch._inductor.aot_compile(
                program.module(check_guards=False), args, kwargs, options=torch_private.inductor_options(gpu, entry)
            )
    if entry != "prefill" and gpu is not None:
        _keeps_the_contract(files)
    length = edit.user_input(program, "tokens").meta["val"].shape[0]
    if entry == "prefill" and not edit.symbolic(length):
        raise KilnError(
            f"compiling prefill: the compiler fixed the number of tokens at {length}; an operator compares it with another size"
        )
    if entry == "prefill" and (found := edit.bounds(length)) != (2, spec.prefill_chunk):
        raise KilnError(f"compiling prefill: the compiler narrowed 2 to {spec.prefill_chunk} tokens to {found[0]} to {found[1]}")
    constants = [c.name for c in declared_constants(next(Path(f).read_text() for f in files if f.endswith("wrapper.cpp")))]
    return CompiledEntry(
        entry=entry,
        library=next(Path(f) for f in files if f.endswith(".so")),
        reports=lowered.reports,
        kv=lowered.kv,
        constants=constants,
        kernels=torch_private.KERNELS,
        export_s=traced - start,
        compile_s=time.monotonic() - traced,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _keeps_the_contract(files: list[str]) -> None:
    """KilnError where a kernel that may start early does something before it waits that it may not do."""
    found = [problem for f in files if f.endswith(".so") for image in images(Path(f).read_bytes()) for problem in contract.check(image)]
    if found:
        raise KilnError(f"compiling decode: {found[0]}{f' ({len(found)} findings)' if found[1:] else ''}; this is a bug in Kiln")


def available_targets() -> list[str]:
    return ["cpu", *gpu_targets()]


def native_target() -> str:
    """The target of this machine's GPU; raises KilnError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise KilnError("--target native: this machine has no usable NVIDIA GPU; name one of " + ", ".join(available_targets()))
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    if name not in gpu_targets():
        raise KilnError(f"--target native: this GPU is {name}, which is not in configs/gpus.toml ({', '.join(gpu_targets())})")
    return name
