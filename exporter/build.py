"""`kiln export`: check, plan, pack, compile, write."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kiln.custom_ops.attention.flash import check_kernel_shapes
from kiln.custom_ops.delta import rule as delta
from kiln.custom_ops.dtypes import DTYPES, dtype_name
from kiln.custom_ops.gpu.early import waiting_kernels
from kiln.custom_ops.gpu.tables import borrowed, lacking
from kiln.custom_ops.gpu.target import gpu_targets
from kiln.custom_ops.tq4.codec import check_dim
from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.fixed_point import TERMS
from kiln.exporter.artifact.link import link_weights
from kiln.exporter.artifact.mapping import constant_records, gguf_record
from kiln.exporter.artifact.memory import memory_plan
from kiln.exporter.artifact.output import check_output, check_space, staged
from kiln.exporter.artifact.record import write_manifest
from kiln.exporter.artifact.weights import write_weights
from kiln.exporter.compiler.compile import CompiledEntry, available_targets, compile_target, native_target
from kiln.exporter.compiler.host import check_gpu_tools
from kiln.exporter.compiler.torch_private import check_versions
from kiln.exporter.compiler.trace import DRAFT_ENTRY, ENTRIES, DrafterSpec, GraphSpec
from kiln.exporter.compiler.workers import none_left
from kiln.exporter.errors import KilnError, Problems, printable
from kiln.exporter.files import write_text
from kiln.exporter.model.caches import kv_plan
from kiln.exporter.model.decoder import check_supported
from kiln.exporter.model.places import needed_tables
from kiln.exporter.model.records import DeltaNet, DraftConfig, cache_specs
from kiln.exporter.progress import bar, say, size_text
from kiln.exporter.source.finite import scan
from kiln.exporter.source.plan import ModelPlan, key_factors
from kiln.exporter.source.weights import DRAFT, weight_bytes
from kiln.exporter.temporary import working_folder
from kiln.passes.records import UNFUSED, PassOptions, first_of

GIB = 2**30
PACKAGE_BYTES = 64 << 20  # of the compiled code for one target and what else is small, at most
DEFAULT_SEQ_LEN = 8192
ROW_ALIGNMENT = 16  # bytes, of what compiled code takes for a cache: one timeline's slice of those of all rows


@dataclass(frozen=True)
class ExportOptions:
    """The options of `kiln export`, by their names there."""

    gguf_path: Path
    out: Path
    draft_gguf: Path | None = None
    weights: str = "gguf"  # they stay in the file; or "copy"
    shared: bool = False  # weights "gguf", for any file like this one: none is linked, and the numbers in it are not read
    hash_weights: bool = False
    ple: str = "device"  # or "host": where a GPU finds the table of a per-layer embedding
    max_seq_len: int | None = None
    prefill_chunk: int = 2048
    turboquant: bool = False
    residual_length: int = PassOptions.residual_length
    key_center: bool = PassOptions.key_center
    cache: str = "float16"
    decode_rows: tuple[int, ...] = (1,)
    rows: int = 1
    targets: tuple[str, ...] = ()
    activation_dtype: str = "auto"
    decode_activations: str = "exact"
    fuse_decode: bool = True
    allow_unfused: bool = False
    kv_len: bool = True
    matmul: str = "blas"
    head_budget_mib: int = 256
    allow_nonfinite: bool = False
    dump_passes: Path | None = None
    dry_run: bool = False
    force: bool = False


def choose_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of targets, checked; without one: the GPU here, else the CPU."""
    if not names:
        if torch.cuda.is_available():
            return (native_target(),)
        say("no GPU here and no --target: compiling for the CPU (name a GPU with --target sm_90)")
        return ("cpu",)
    chosen = tuple(dict.fromkeys(native_target() if name == "native" else name for name in names))
    unknown = [name for name in chosen if name not in available_targets()]
    if unknown:
        raise KilnError(f"--target {unknown[0]} is unknown; choose from {', '.join([*available_targets(), 'native'])}")
    if "cpu" in chosen and len(chosen) > 1:
        raise KilnError("--target cpu goes alone: its activations and caches are float32, a GPU's bfloat16; export twice")
    return chosen


def graph_spec(options: ExportOptions, plan: ModelPlan, targets: tuple[str, ...], drafter: ModelPlan | None = None) -> GraphSpec:
    """What is compiled for a model, from the options. Raises KilnError where they do not go together, or not with the model."""
    config = plan.config
    check_supported(config)
    max_seq_len = options.max_seq_len or min(DEFAULT_SEQ_LEN, config.context_length)
    if max_seq_len > config.context_length:
        raise KilnError(f"--max-seq-len {max_seq_len} is beyond the model's context of {config.context_length}; ask for at most that")
    if options.ple == "host" and not any(p.gathered for p in plan.weights):
        raise KilnError(f"--ple host: {config.name} has no per-layer embedding; leave it away")
    cpu = targets == ("cpu",)
    dtype = options.activation_dtype
    if dtype == "auto":
        dtype = "float32" if cpu else "bfloat16"
    if options.decode_activations == "int8" and not options.fuse_decode:
        raise KilnError("--decode-activations int8 is what fused decoding multiplies; it does not go with --no-fuse-decode")
    if options.residual_length < 32 or options.residual_length % 32:
        raise KilnError(f"--residual-length {options.residual_length}: give a multiple of 32, at least 32")
    global_layers = any(cache.kind == "global" for cache in cache_specs(config))
    if options.turboquant and not global_layers:
        raise KilnError(f"{config.name} has no global layers, whose caches TQ4 is for; give --kv-cache f16")
    if not cpu and options.decode_rows != (1,):
        _check_several(options, plan)
    if options.decode_rows != (1,) and any(cache.kind == "state" for cache in cache_specs(config)):
        raise KilnError(f"--decode-rows: {config.name} has layers with a state, which takes one token after the other; leave it away")
    spec = GraphSpec(
        cache=options.cache,
        drafter=_drafter(options, drafter) if drafter else None,
        config=config,
        plan=plan.weights,
        max_seq_len=max_seq_len,
        prefill_chunk=min(options.prefill_chunk, max_seq_len),
        activation_dtype=dtype,
        options=PassOptions(
            turboquant=options.turboquant,
            residual_length=options.residual_length,
            key_center=options.key_center,
            kv_len=options.kv_len and global_layers,
            materialized_head_budget=options.head_budget_mib << 20,
            materializes_head=cpu,
            reads_packed=cpu,
            matmul="blas" if cpu else options.matmul,
            decode_bytes=0 if cpu or not options.fuse_decode else decode_bytes(options, dtype),
            allow_unfused=options.allow_unfused,
            decode_rows=options.decode_rows,
            rows=options.rows,
        ),
    )
    largest, tensor = plan.key_bound
    if spec.cache_dtype == torch.float16 and largest > torch.finfo(torch.float16).max:
        raise KilnError(f"{tensor}: keys or queries up to {largest:.3g} do not fit float16; give --kv-cache bf16")
    _check_shapes(spec, gpu=not cpu)
    _check_rows(spec)
    return spec


def _drafter(options: ExportOptions, drafter: ModelPlan) -> DrafterSpec:
    """KilnError where nothing would check its drafts."""
    assert isinstance(drafter.config, DraftConfig)
    if options.decode_rows == (1,):
        raise KilnError("--draft-gguf: drafts are checked by steps of several tokens; give --decode-rows 1,2,4,8 with it")
    return DrafterSpec(drafter.config, drafter.weights)


def _check_several(options: ExportOptions, plan: ModelPlan) -> None:
    """KilnError where a GPU's step of several tokens would not be what steps of one are: fused kernels alone keep a token's bits."""
    if not options.fuse_decode or options.allow_unfused:
        other = "--no-fuse-decode" if not options.fuse_decode else "--allow-unfused"
        raise KilnError(f"--decode-rows: only fused kernels keep a token's bits among others'; it does not go with {other}")
    if not any(p.block_type in LAYOUTS for p in plan.weights):
        raise KilnError(f"--decode-rows: {plan.config.name} has no quantized weights, which a GPU's steps of several tokens multiply")


def _check_rows(spec: GraphSpec) -> None:
    """KilnError where a row's caches would not begin where compiled code expects memory to begin."""
    if spec.options.rows == 1:
        return
    for buffer in kv_plan(spec.config, spec.max_seq_len, spec.cache_dtype, spec.options):
        if buffer.nbytes % ROW_ALIGNMENT:
            better = -(-spec.max_seq_len // ROW_ALIGNMENT) * ROW_ALIGNMENT
            raise KilnError(f"--rows {spec.options.rows}: {buffer.name} has {buffer.nbytes} bytes, no multiple of {ROW_ALIGNMENT}; "
                            f"give --max-seq-len {better}")  # fmt: skip


def _check_shapes(spec: GraphSpec, gpu: bool) -> None:
    """KilnError for head sizes and caches that the kernels do not take: compiling would find out after minutes."""
    try:
        for cache in cache_specs(spec.config):
            if spec.options.turboquant and cache.kind == "global":
                check_dim(cache.head_dim)
        for rule in (layer.mixer for layer in spec.config.layers if gpu and isinstance(layer.mixer, DeltaNet)):
            delta.check_kernel_shapes(rule.key_dim, rule.value_dim)
        for buffer in kv_plan(spec.config, spec.max_seq_len, spec.cache_dtype, spec.options) if gpu else ():
            keys = buffer.kind in ("ring", "global") and buffer.dtype == spec.cache_dtype and len(buffer.shape) == 3  # or values
            if keys:
                check_kernel_shapes(buffer.name, buffer.shape[-1], torch.empty(buffer.shape, device="meta"))
    except ValueError as e:
        raise KilnError(f"{spec.config.name}: {e}; give --target cpu or another --kv-cache") from e


def decode_bytes(options: ExportOptions, dtype: str) -> int:
    """Bytes of an activation of a decode matmul in fixed point: what loses nothing against `dtype`, or one with `int8`."""
    return 1 if options.decode_activations == "int8" else TERMS[DTYPES[dtype].torch]


def export_artifact(options: ExportOptions, plan: ModelPlan, drafter: ModelPlan | None = None) -> None:
    """Compiles and writes `plan`, the model at `options.gguf_path`, and the drafter beside it, the model at `options.draft_gguf`. Raises
    KilnError; on any failure nothing is left at `options.out`."""
    start = time.monotonic()
    check_versions()
    output = check_output(options.out, options.force, [options.gguf_path, *([options.draft_gguf] if options.draft_gguf else [])])
    targets = choose_targets(options.targets)
    if targets != ("cpu",):
        check_gpu_tools()
    spec = graph_spec(options, plan, targets, drafter)
    for note in (*plan.notes, *(drafter.notes if drafter else ())):
        say(note)
    if spec.drafter and spec.options.decode_bytes and not any(p.block_type in LAYOUTS for p in spec.drafter.plan):
        say(f"note: {spec.drafter.config.name} is not quantized: its step is not fused, and slower than that of a Q8_0 file")
    print_plan(spec, options, targets)
    check_tables(spec, targets)
    check_places(spec)
    note_borrowed(targets)
    try:
        copied = 0 if options.weights == "gguf" else weight_bytes(spec.config, spec.plan)
        copied += weight_bytes(spec.drafter.config, spec.drafter.plan) if spec.drafter else 0
        check_space(output, copied + PACKAGE_BYTES * len(targets))
    except KilnError as e:
        if not options.dry_run:
            raise
        say(f"note: {e}")
    if options.dry_run:
        return
    with working_folder() as work, none_left(), staged(output) as stage:
        if plan.tokenizer:
            plan.tokenizer.write(stage / "tokenizer.json")
        if plan.chat:
            write_text(stage / "chat_template.jinja", plan.chat.template, "the chat template")
        tokenizer = {"file": "tokenizer.json", **plan.tokenizer.record()} if plan.tokenizer else None
        chat = plan.chat.record() if plan.chat else None
        records, gguf = _write_constants(stage / "weights.safetensors", spec, options, plan, drafter)
        compiled = []
        for target in targets:
            say(f"compiling for {target}")
            name = "model.pt2" if target == "cpu" else f"model.{target}.pt2"
            compiled.append(compile_target(spec, target, stage / name, work, options.dump_passes, _report, packing=gguf is not None))
        if sorted(spec.caches("prefill"), key=str) != sorted(compiled[0].entries[0].kv, key=str):  # of prefill, which has one timeline
            raise KilnError("the compiled caches differ from the plan; this is a bug in Kiln")
        waits = tuple(waiting_kernels())
        write_manifest(stage, spec, options.gguf_path, compiled, records, tokenizer, chat, waits, gguf, options.draft_gguf)
        where = _link(stage, options.out, plan) if gguf and not options.shared else None  # last: a name that is taken is no link
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = max(peak, *(e.peak_rss for c in compiled for e in c.entries))
    size = sum(f.lstat().st_size for f in options.out.iterdir())
    say(f"{options.out}: {size_text(size)} in {time.monotonic() - start:.0f} s, peak memory of one process {peak / GIB:.2f} GiB")
    if where:
        say(where)


def _link(stage: Path, out: Path, plan: ModelPlan) -> str:
    """Links the file of the weights; where they are, for the user."""
    file, parts = plan.gguf.path.resolve(), len(plan.gguf.files)
    where = f"weights stay in {file}" + (f" and the other {parts - 1} part{'s' if parts > 2 else ''}" if parts > 1 else "")
    try:
        link_weights(stage, plan.gguf)
    except OSError as e:
        where += f"; {out} cannot hold a link to it ({e.strerror}): play it with --weights {file}"
    return printable(where)


def _write_constants(
    path: Path, spec: GraphSpec, options: ExportOptions, plan: ModelPlan, drafter: ModelPlan | None
) -> tuple[list[dict], dict | None]:
    """The weights file, with the records of all constants; where weights stay in the GGUF file it holds what is computed from metadata
    alone, and `weights.gguf` of the manifest comes with it. A drafter's weights are copied either way."""
    if options.weights == "copy":
        with bar("packing weights") as progress:
            return write_weights(path, plan, progress, options.allow_nonfinite, drafter, options.ple), None
    if not options.allow_nonfinite and not options.shared:  # packing looks at every number, too
        with bar("checking weights") as progress:
            problems = scan(plan.gguf, dict.fromkeys(source for p in plan.weights for source in p.sources), progress)
        if problems:
            raise Problems(problems, f"kiln inspect {plan.gguf.path}")
    limit = torch.finfo(torch.float16).max if spec.cache_dtype == torch.float16 else None
    limits = {name: limit / factor for name, factor in key_factors(plan.config).items()} if limit else {}
    computed = write_weights(path, replace(plan, weights=()), None, options.allow_nonfinite, drafter)
    return constant_records(plan, limits, options.ple) + computed, gguf_record(plan, options.hash_weights)


def _report(entry: CompiledEntry) -> None:
    for report in entry.reports:
        if report.shortfall:
            say(f"note: {entry.entry}: {report.shortfall}")
    say(
        f"  {entry.entry}: traced in {entry.export_s:.0f} s, compiled in {entry.compile_s:.0f} s, {len(entry.constants)} constants, "
        f"{len(entry.kernels)} GPU kernels, peak memory {entry.peak_rss / GIB:.2f} GiB"
    )


def check_tables(spec: GraphSpec, targets: tuple[str, ...]) -> None:
    """KilnError where the kernels have no configuration for one of the model's head sizes."""
    if targets != ("cpu",) and spec.model_dtype != torch.float32 and (gaps := lacking(needed_tables(spec.config, spec.options))):
        raise KilnError(f"no kernel is configured for this model's head sizes: {', '.join(gaps)}; add entries there (see make tune)")


def check_places(spec: GraphSpec) -> None:
    """KilnError where a pass is known to miss a place: of all that is expected, what has a reason to be missed.

    What keeps the pass from one of a matrix's places keeps it from the matrix, so none is told in vain. The passes would find out, too, but
    after the weights were packed.
    """
    for entry in () if spec.options.allow_unfused else spec.entries:
        for name, places in spec.places(entry).items():
            if missed := [f"{place} ({why})" for place, why in places.items() if why]:
                instead = UNFUSED if entry in ENTRIES else "leave --decode-rows away"
                instead = "give a drafter that is quantized throughout, as in Q8_0" if entry == DRAFT_ENTRY else instead
                raise KilnError(f"{entry}: pass {name} does not rewrite {first_of(missed)}; {instead}")


def note_borrowed(targets: tuple[str, ...]) -> None:
    """On stderr, for each target whose kernels are configured as another architecture's are."""
    for target in targets:
        for sm, tables in borrowed(gpu_targets()[target]).items() if target != "cpu" else ():
            say(f"note: {target} has no entry in {', '.join(tables)}: kernels are configured as for sm_{sm}, the nearest (see make tune)")


def print_plan(spec: GraphSpec, options: ExportOptions, targets: tuple[str, ...]) -> None:
    """The plan on stdout: with --dry-run a line for every matrix, always the sums."""
    config, memory, cache = spec.config, memory_plan(spec, options.ple), dtype_name(spec.cache_dtype)
    if options.dry_run:
        print(f"{'matrix':34} {'type':5} {'N':>7} {'K':>6}  from")
        for p in spec.plan:
            if p.K:
                print(f"{p.name:34} {p.block_type:5} {p.N:7d} {p.K:6d}  {' + '.join(s.rsplit('.', 2)[-2] for s in p.sources)}")
        for p in spec.drafter.plan if spec.drafter else ():
            if p.K:
                print(f"{DRAFT + p.name:34} {p.block_type:5} {p.N:7d} {p.K:6d}  {' + '.join(s.rsplit('.', 2)[-2] for s in p.sources)}")
    print(f"model       {config.name} ({config.architecture}), {len(config.layers)} layers")
    if spec.drafter:
        print(f"drafter     {spec.drafter.config.name} ({spec.drafter.config.architecture}), {len(spec.drafter.config.layers)} layers")
    print(f"target      {', '.join(targets)}; activations {spec.activation_dtype}")
    print(f"context     {spec.max_seq_len} tokens, prefill in chunks of {spec.prefill_chunk}")
    aside = f"  (and {size_text(memory.host_weights)} on the host, of a GPU)" if memory.host_weights else ""
    print(f"weights     {size_text(memory.weights):>11}{aside}")
    kept = ["sliding layers"] if any(cache.kind == "ring" for cache in cache_specs(config)) else []
    kept += [f"the newest {spec.options.residual_length} of the global layers"] if spec.options.turboquant else []
    print(f"KV ring     {size_text(memory.kv_ring):>11}  ({' and '.join(kept) or 'none'}, {cache})")
    print(f"KV global   {size_text(memory.kv_global):>11}  ({'TQ4' if spec.options.turboquant else cache})")
    if memory.kv_state:
        print(f"state       {size_text(memory.kv_state):>11}  (of any context, before and after a step, float32)")
    if spec.options.rows > 1 or spec.options.spare_slots:
        each = (memory.kv_ring + memory.kv_global + memory.kv_state) // spec.options.rows
        steps = ", ".join(map(str, spec.options.decode_rows))
        print(f"rows        {spec.options.rows:>11}  (timelines of {size_text(each)} each, in all of the above; steps of {steps} tokens)")
    print(f"activations {size_text(memory.activations):>11}  (estimate, prefill scratch included)")
    print(f"total       {size_text(memory.total):>11}", flush=True)
