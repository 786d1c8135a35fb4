"""The `kiln` command."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from kiln.custom_ops.geometry import GEOMETRIES
from kiln.custom_ops.weights.mixes import SYNTHETIC
from kiln.exporter.errors import KilnError
from kiln.exporter.interrupt import ending_cleanly
from kiln.exporter.temporary import working_folder


class UserPath(click.Path):
    """A path as a shell hands it over: `--out=~/model` arrives with its tilde."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # nobody's home; no path at all, which is told where it is opened
            return path.expanduser() if str(path).startswith("~") and not path.exists() else path
        return path


PATH = UserPath(path_type=Path)


class Group(click.Group):
    """One line on stderr and exit code 1 for what the user can mend; click itself gives 2 for usage."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # UTF-8 whatever the locale says; what is no text in it is escaped
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        try:
            with ending_cleanly():
                return super().invoke(ctx)
        except KilnError as e:
            click.echo(f"kiln: error: {e}", err=True)
        except OSError as e:
            if e.errno == errno.EPIPE:  # nobody reads any more
                raise
            click.echo(f"kiln: error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", err=True)
        sys.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kiln-export")
def main() -> None:
    """Fire a GGUF file into a compiled artifact, and run it."""


@main.command()
@click.option("--gguf", "gguf_path", type=PATH, required=True, help="The model file (any part of a split one).")
@click.option("--out", type=PATH, required=True, help="Directory of the artifact.")
@click.option(
    "--max-seq-len",
    type=click.IntRange(16),
    help="Longest prompt + answer, in tokens.  [default: 8192, or the model's context if that is shorter]",
)
@click.option(
    "--prefill-chunk", type=click.IntRange(16), default=2048, show_default=True, help="Longest piece of a prompt in one call, in tokens."
)
@click.option(
    "--kv-cache",
    type=click.Choice(["f16", "bf16", "tq4"]),
    help="f16, bf16: keys and values in 16 bits (on the CPU 32); tq4: those of the global layers in 4 bits, TurboQuant.  [default: f16]",
)
@click.option("--turboquant/--no-turboquant", default=None, help="Short for --kv-cache tq4 or f16.")
@click.option(
    "--residual-length",
    type=click.IntRange(32),
    metavar="N",
    help="With tq4: the newest N keys and values of a global layer are read in 16 bits; a multiple of 32.  [default: 256]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="cpu, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 or native; repeatable.  [default: native where there is a GPU, else cpu]",
)
@click.option(
    "--activation-dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on the CPU, bfloat16 on a GPU.",
)
@click.option(
    "--decode-activations",
    type=click.Choice(["exact", "int8"]),
    default="exact",
    show_default=True,
    help="Of one token's matmuls on a GPU. exact: nothing is lost against the activation dtype; int8: a byte each, about 0.6 % a matmul.",
)
@click.option("--fuse-decode/--no-fuse-decode", default=True, show_default=True, help="One token's layer in a few kernels, on a GPU.")
@click.option(
    "--matmul",
    type=click.Choice(["kiln", "blas"]),
    default="blas",
    show_default=True,
    help="A prefill's matmuls on a GPU. blas: by cuBLAS, found when it is played; kiln: compiled into the package.",
)
@click.option("--kv-len/--no-kv-len", default=True, show_default=True, help="Bound global attention by the filled length.")
@click.option(
    "--head-budget-mib", type=click.IntRange(1), default=256, show_default=True, help="Largest piece of a dequantized matrix in memory."
)
@click.option("--allow-unfused", is_flag=True, help="Export a model that a pass or a kernel table does not fit whole: slower, and said so.")
@click.option("--chat-template", type=PATH, help="Use this Jinja file instead of the model file's template.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep block scales and weights that are NaN or infinite.")
@click.option("--dump-passes", type=PATH, help="Write the graph after every pass here.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--force", is_flag=True, help="Replace an artifact at --out.")
def export(kv_cache: str | None, turboquant: bool | None, residual_length: int | None, **options: Any) -> None:
    """Compile a GGUF file into an artifact."""
    if kv_cache and turboquant is not None and (kv_cache == "tq4") != turboquant:
        flag = "--turboquant" if turboquant else "--no-turboquant"
        raise click.UsageError(f"--kv-cache {kv_cache} and {flag} contradict each other; give one of them")
    tq4 = bool(turboquant) or kv_cache == "tq4"
    if residual_length is not None:
        if not tq4:
            raise click.UsageError("--residual-length is part of the TQ4 cache; give --kv-cache tq4 with it")
        if residual_length % 32:
            raise click.UsageError(f"--residual-length {residual_length} is not a multiple of 32")
        options["residual_length"] = residual_length
    from kiln.exporter.checks import check_paths
    from kiln.exporter.compiler.host import check_compiler
    from kiln.exporter.compiler.workers import AT_ONCE, none_left, prepare
    from kiln.exporter.source.plan import ReadOptions, read_plan

    # Before torch is imported: what cannot be done is refused at once.
    check_paths(options["out"], options["force"], options["gguf_path"], options["dump_passes"])
    with working_folder() as folder, none_left():
        check_compiler(folder)
        # Packing checks every number on its way; a dry run, which packs nothing, reads them for that alone.
        scan = options["dry_run"] and not options["allow_nonfinite"]
        plan = read_plan(options["gguf_path"], ReadOptions(options.pop("chat_template"), scan))
        if not options["dry_run"]:
            prepare(AT_ONCE)  # they import PyTorch while this process does
        from kiln.exporter.build import ExportOptions, export_artifact

        cache = "bfloat16" if kv_cache == "bf16" else "float16"
        export_artifact(ExportOptions(turboquant=tq4, cache=cache, **options), plan)


@main.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="The whole record as JSON.")
@click.option("--verify", is_flag=True, help="Recompute every checksum of an artifact.")
@click.option("--no-scan", is_flag=True, help="Leave the weights of a GGUF file unread: whether all of them are finite is not known then.")
def inspect(path: Path, as_json: bool, verify: bool, no_scan: bool) -> None:
    """Show what a GGUF file or an artifact holds, and everything for which `kiln export` would refuse the file (exit code 1)."""
    from kiln.exporter.artifact import show

    record = show.artifact(path, verify) if _is_artifact(path) else show.gguf(path, scan=not no_scan)
    click.echo(json.dumps(record, indent=1, ensure_ascii=False) if as_json else show.text(record))
    for note in record.get("notes", ()):
        click.echo(note, err=True)
    for problem in record.get("problems", ()):
        click.echo(f"kiln: error: {problem}", err=True)
    if record.get("problems"):
        sys.exit(1)


def _is_artifact(path: Path) -> bool:
    """A folder, unless it holds GGUF files and no manifest: what to give instead is said there."""
    return path.is_dir() and ((path / "manifest.json").exists() or not any(path.glob("*.gguf")))


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Play an artifact: kiln run ARTIFACT --prompt TEXT (all options of kiln-run)."""
    from kiln.exporter.measure.runner import runner

    binary = runner()
    os.execv(binary, [binary, *arguments])


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--depths", metavar="N,N,...", help="Tokens in the caches.  [default: 128 and up in steps of 4; with --profile: 2048]")
@click.option("--prefill-chunk", type=click.IntRange(2), help="Tokens of the timed prefill call.  [default: the artifact's]")
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True, help="Decode steps timed at each depth.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--profile", is_flag=True, help="Instead: the time of a decode step and of a prefill call, kernel by kernel (GPU).")
@click.option("--json", "as_json", is_flag=True, help="The record as JSON instead of a table.")
@click.option("--out", type=PATH, help="Write the record here, too.")
@click.option("--plot", "picture", type=PATH, help="Draw speed against depth into this file.")
def bench(as_json: bool, **options: Any) -> None:
    """Measure an artifact: prefill and decode at several depths, memory, share of what the device can do."""
    from kiln.exporter.measure.bench import bench as measure

    with working_folder():
        record, text = measure(**options)
    click.echo(json.dumps(record, indent=1) if as_json else text)


@main.command()
@click.option("--preset", type=click.Choice(list(GEOMETRIES)), required=True)
@click.option("--mix", type=click.Choice(SYNTHETIC), default="q4_k_m", show_default=True)
@click.option("--out", type=PATH, required=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Keep only the first layers.")
@click.option("--vocab-from", type=PATH, help="Take the tokenizer of this GGUF file.")
@click.option("--sparse", is_flag=True, help="Leave the weights a hole in the file: enough for export --dry-run.")
def synth(preset: str, mix: str, out: Path, seed: int, layers: int | None, vocab_from: Path | None, sparse: bool) -> None:
    """Write a GGUF file of random, well-scaled weights in a real geometry."""
    from kiln.exporter.progress import bar, size_text
    from kiln.exporter.tools.synth import write_synthetic

    with bar("writing") as progress:
        write_synthetic(out, preset, mix, seed, layers=layers, vocab_from=vocab_from, progress=progress, sparse=sparse)
    click.echo(f"{out}: {size_text(out.stat().st_size)}")


@main.command(name="eval")
@click.argument("path", metavar="ARTIFACT|GGUF", type=PATH)
@click.option("--suite", default="ppl", show_default=True, help="ppl, kld, needle; several with commas.")
@click.option("--text", type=PATH, help="Text to score; its lines are also what keys are hidden among.")
@click.option("--tokens", type=click.IntRange(2), default=2048, show_default=True, help="Tokens to score.")
@click.option("--depths", default="2048", show_default=True, help="Context lengths to hide keys in, with commas.")
@click.option("--needles", type=click.IntRange(1), default=8, show_default=True, help="Keys hidden in a context.")
@click.option("--kv-cache", type=click.Choice(["f16", "bf16", "f32", "tq4"]), help="Of a GGUF file.  [default: GPU f16, CPU f32]")
@click.option("--reference", type=PATH, help="GGUF file whose fp32 forward kld compares to.  [default: the file itself]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the keys and where they are.")
@click.option("--json", "as_json", is_flag=True, help="The whole record as JSON.")
@click.option("--plot", "picture", type=PATH, help="Draw divergence and retrieval into this file.")
def evaluate(suite: str, depths: str, as_json: bool, **options: Any) -> None:
    """Measure a model: perplexity, divergence from fp32, retrieval of keys."""
    from kiln.exporter.measure import evaluate as ev

    try:
        lengths = tuple(int(depth) for depth in depths.split(","))
    except ValueError:
        raise click.BadParameter(f"{depths!r} is not a list of numbers like 2048,8192", param_hint="--depths") from None
    with working_folder():
        record = ev.evaluate(ev.EvalOptions(suites=tuple(suite.split(",")), depths=lengths, **options))
    click.echo(json.dumps(record, indent=1) if as_json else ev.report(record))
