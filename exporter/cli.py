"""The `kiln` command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kiln.custom_ops.geometry import GEOMETRIES, MAX_ROWS
from kiln.custom_ops.weights.mixes import SYNTHETIC
from kiln.exporter.errors import KilnError, UsageProblem
from kiln.exporter.interrupt import ending_cleanly
from kiln.exporter.measure.serve_command import bench_serve
from kiln.exporter.parameters import DEVICE, PATH, WEIGHTS, Float, is_model_file, of_what_is_played
from kiln.exporter.serve.command import serve
from kiln.exporter.temporary import working_folder


class Group(click.Group):
    """One line on stderr for what the user can mend: exit code 2 for usage, which click itself gives as well, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # UTF-8 whatever the locale says; what is no text in it is escaped
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        try:
            with ending_cleanly():
                return super().invoke(ctx)
        except KilnError as e:
            click.echo(f"kiln: error: {e}", err=True)
            sys.exit(2 if isinstance(e, UsageProblem) else 1)

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)
        except OSError as e:  # of a help text as well; that nobody reads any more ends click itself
            click.echo(f"kiln: error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", err=True)
            sys.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kiln-export")
def main() -> None:
    """Fire a GGUF file into a compiled artifact, and run it."""


def _decode_rows(text: str) -> tuple[int, ...]:
    """Ascending, the first 1."""
    try:
        counts = sorted({1, *(int(part) for part in text.split(","))})
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1,2,4,8") from None
    if counts[0] < 1 or counts[-1] > MAX_ROWS:
        raise click.BadParameter(f"{text!r}: a step takes 1 to {MAX_ROWS} tokens")
    return tuple(counts)


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
    "--key-center/--no-key-center",
    default=None,
    help="With tq4: keys are coded less the mean of their head's first ones, which all share.  [default: key-center]",
)
@click.option(
    "--decode-rows",
    metavar="M,M,..",
    default="1",
    show_default=True,
    callback=lambda ctx, option, text: _decode_rows(text),
    help="Numbers of tokens that one step may take, up to 8: of several timelines, or drafts of one. 1 is always among them.",
)
@click.option("--rows", type=click.IntRange(1, 64), default=1, show_default=True, help="Timelines whose caches lie side by side.")
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
@click.option(
    "--ple",
    type=click.Choice(["device", "host"]),
    default="device",
    show_default=True,
    help="Where a GPU finds the table of a per-layer embedding (Gemma 4 E2B, E4B). host: in pinned memory, a token's row over the bus.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "gguf"]),
    default="gguf",
    show_default=True,
    help="gguf: they stay in the file, to which the artifact holds a link; copy: packed into the artifact, which can go without the file.",
)
@click.option("--draft-gguf", type=PATH, help="A drafter of the model, for --draft mtp. Needs --decode-rows; its weights are copied.")
@click.option("--hash-weights", is_flag=True, help="The manifest gets a checksum of every tensor, for --verify.")
@click.option("--allow-unfused", is_flag=True, help="Export a model that a pass or a kernel table does not fit whole: slower, and said so.")
@click.option("--chat-template", type=PATH, help="Use this Jinja file instead of the model file's template.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep block scales and weights that are NaN or infinite.")
@click.option("--dump-passes", type=PATH, help="Write the graph after every pass here.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--force", is_flag=True, help="Replace an artifact at --out.")
def export(kv_cache: str | None, turboquant: bool | None, residual_length: int | None, key_center: bool | None, **options: Any) -> None:
    """Compile a GGUF file into an artifact."""
    if kv_cache and turboquant is not None and (kv_cache == "tq4") != turboquant:
        flag = "--turboquant" if turboquant else "--no-turboquant"
        raise click.UsageError(f"--kv-cache {kv_cache} and {flag} contradict each other; give one of them")
    if options["hash_weights"] and options["weights"] != "gguf":
        raise click.UsageError("--hash-weights is of tensors that stay in the file; it does not go with --weights copy")
    tq4 = bool(turboquant) or kv_cache == "tq4"
    if residual_length is not None:
        if not tq4:
            raise click.UsageError("--residual-length is part of the TQ4 cache; give --kv-cache tq4 with it")
        if residual_length % 32:
            raise click.UsageError(f"--residual-length {residual_length} is not a multiple of 32")
        options["residual_length"] = residual_length
    if key_center is not None:
        if not tq4:
            flag = "--key-center" if key_center else "--no-key-center"
            raise click.UsageError(f"{flag} is part of the TQ4 cache; give --kv-cache tq4 with it")
        options["key_center"] = key_center
    from kiln.exporter.checks import check_paths
    from kiln.exporter.compiler.host import check_compiler
    from kiln.exporter.compiler.workers import none_left, prepare
    from kiln.exporter.source.plan import ReadOptions, read_plan

    # Before torch is imported: what cannot be done is refused at once.
    check_paths(options["out"], options["force"], options["gguf_path"], options["dump_passes"])
    with working_folder() as folder, none_left():
        check_compiler(folder)
        # An export looks at every number later; a dry run, which ends before, reads them here.
        scan = options["dry_run"] and not options["allow_nonfinite"]
        plan = read_plan(options["gguf_path"], ReadOptions(options.pop("chat_template"), scan))
        drafter = None
        if options["draft_gguf"] is not None:
            from kiln.exporter.source.drafter import read_drafter

            drafter = read_drafter(options["draft_gguf"], plan)
        if not options["dry_run"]:
            prepare()  # PyTorch is imported there while it is here
        from kiln.exporter.build import ExportOptions, export_artifact

        cache = "bfloat16" if kv_cache == "bf16" else "float16"
        export_artifact(ExportOptions(turboquant=tq4, cache=cache, **options), plan, drafter)


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
    """Play an artifact: kiln run ARTIFACT --prompt TEXT (all options of kiln-run, and --system, --messages, --think, --stop); or a model
    file: kiln run MODEL.gguf --prompt TEXT.

    Code for a model file is compiled once and kept (kiln cache). Beside kiln-run's options: --max-seq-len N, --kv-cache f16|bf16|tq4 and
    --target sm_NN say what is compiled, as in kiln export; --code DIR names what was compiled elsewhere.
    """
    from kiln.exporter.measure.runner import runner

    arguments = ("--help", *arguments[1:]) if arguments[:1] == ("-h",) else arguments  # as of every other command
    names = {name for parameter in converse.params for name in parameter.opts if parameter.name in CONVERSING}
    if any(argument.partition("=")[0] in names for argument in arguments):
        converse.main(list(arguments), prog_name="kiln run")
    binary = runner()
    if arguments and not arguments[0].startswith("-") and is_model_file(arguments[0]):
        from kiln.exporter.run_gguf import command, parse

        # Usage first: code is compiled for a minute. Of an artifact that is not there kiln-run says so behind it.
        usage = subprocess.run([binary, os.devnull, *parse(arguments).rest], stdin=subprocess.DEVNULL, capture_output=True)
        if usage.returncode == 2:
            click.echo(usage.stderr.decode(errors="replace"), nl=False, err=True)
            sys.exit(2)
        if "--help" not in arguments:
            arguments = tuple(command(arguments))
    sys.stderr.flush()
    if "--help" in arguments:
        subprocess.run([binary, *arguments], check=True)
        with click.Context(converse, info_name="kiln run") as ctx:
            rows = [row for p in converse.get_params(ctx) if p.name in CONVERSING and (row := p.get_help_record(ctx))]
        click.echo("\nwith Python (kiln run), and then of the options above only those of prompt, sampling, device and --json:")
        for option, what in rows:
            click.echo(f"  {option:<26}{what}")
        return
    os.execv(binary, [binary, *arguments])


CONVERSING = ("system", "messages", "think", "stop")  # options of `kiln run` that are played from Python


def drafts(command: Any) -> Any:
    """The options of what is drafted, and checked in steps of several tokens."""
    most = click.option("--draft-length", type=click.IntRange(0), default=0, metavar="N", help="Most drafts a step.  [default: what fits]")
    which = click.option(
        "--draft", type=click.Choice(["off", "ngram", "mtp"]), default="off", show_default=True,
        help="Check several tokens a step: ngram, what followed where the text's end occurred before; mtp, by the artifact's drafter. "
        "The text stays the same.",
    )  # fmt: skip
    return which(most(command))


def sampling(temperature: float, top_k: int, top_p: float, tokens: int | None, seed: str) -> Callable[[Any], Any]:
    """The options of answers, with the defaults of one command."""

    def add(command: Any) -> Any:
        for option in (
            click.option("--temperature", type=Float(0), default=temperature, show_default=True, help="0 is greedy."),
            click.option("--top-k", type=click.IntRange(0, (1 << 31) - 1), default=top_k, show_default=True, help="0 is off."),
            click.option("--top-p", type=Float(0, 1, min_open=True), default=top_p, show_default=True, help="1 is off."),
            click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help=f"Of the sampling.  [default: {seed}]"),
            click.option("--max-new-tokens", type=click.IntRange(1, (1 << 31) - 1), default=tokens, help="Longest answer, in tokens."),
            drafts,
            of_what_is_played,
            DEVICE,
            click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]"),
            click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
            click.option("--think", is_flag=True, help="Let the model think before it answers."),
            click.option("--system", metavar="TEXT", help="The system prompt."),
        ):
            command = option(command)
        return command

    return add


def snapshot_budgets(command: Any) -> Any:
    """The options of what is kept to be used again."""
    for where, default in (("host", 4.0), ("device", 4.0)):
        what = f"GiB of the {'GPU' if where == 'device' else 'host'} that snapshots of what was read may take."
        size = Float(0, 1 << 20)
        command = click.option(f"--snapshot-{where}-gib", type=size, default=default, show_default=True, help=what)(command)
    return command


@click.command(name="run")
@click.argument("artifact", metavar="ARTIFACT|GGUF", type=PATH)
@click.option("--prompt", metavar="TEXT", help="The user's turn.")
@click.option("--prompt-file", type=PATH, help="The same, from a file; - is standard input.")
@click.option(
    "--messages", type=PATH, metavar="FILE.json", help="Answer this conversation: a JSON list of messages, or one that was saved."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@sampling(0.0, 0, 1.0, 128, "0")
def converse(
    artifact: Path, prompt: str | None, prompt_file: Path | None, messages: Path | None, as_json: bool, system: str | None, think: bool,
    seed: int | None, device: str, threads: int | None, weights: Path | None, max_seq_len: int | None, kv_cache: str | None, **options: Any,
) -> None:  # fmt: skip
    """Answer a conversation."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if prompt is None and prompt_file is None and messages is None:
        raise click.UsageError("give one of --prompt, --prompt-file, --messages")
    from kiln.exporter.conversation import terminal
    from kiln.exporter.conversation.chat import Options
    from kiln.exporter.run_gguf import played

    if prompt_file is not None:
        prompt = terminal.prompt_text(prompt_file)
    artifact, weights = played(artifact, device, weights, max_seq_len, kv_cache)
    chat = terminal.open_chat(artifact, device, threads, Options(seed=seed or 0, **options), weights=weights)
    try:
        terminal.begin(chat, messages, system, think, asks=prompt is None)
        terminal.run_once(chat, prompt, as_json)
    finally:
        chat.dialect.close()


@main.command()
@click.argument("artifact", metavar="ARTIFACT|GGUF", type=PATH)
@click.option(
    "--messages", type=PATH, metavar="FILE.json", help="Go on with this conversation: saved by /save, or a JSON list of messages."
)
@click.option(
    "--session-dir", type=PATH, metavar="DIR", help="With /save, keep what was computed here as well, and go on from it with /load."
)
@snapshot_budgets
@sampling(1.0, 64, 0.95, None, "random")
def chat(
    artifact: Path,
    messages: Path | None,
    session_dir: Path | None,
    snapshot_device_gib: float,
    snapshot_host_gib: float,
    system: str | None,
    think: bool,
    seed: int | None,
    device: str,
    threads: int | None,
    weights: Path | None,
    max_seq_len: int | None,
    kv_cache: str | None,
    **options: Any,
) -> None:
    """Talk to an artifact, or to a model file, whose code is compiled once and kept; /help lists what can be asked besides questions."""
    from kiln.exporter.conversation import terminal
    from kiln.exporter.conversation.chat import Options
    from kiln.exporter.run_gguf import played

    options["seed"] = terminal.random_seed() if seed is None else seed
    budgets = (snapshot_device_gib, snapshot_host_gib)
    artifact, weights = played(artifact, device, weights, max_seq_len, kv_cache)
    opened = terminal.open_chat(artifact, device, threads, Options(**options), budgets, session_dir, weights)
    try:
        terminal.begin(opened, messages, system, think, asks=False)
        terminal.talk(opened)
    finally:
        opened.dialect.close()


@main.group()
def cache() -> None:
    """Code that kiln run MODEL.gguf has compiled and kept."""


@cache.command(name="list")
def list_cache() -> None:
    """Every model whose code is kept: its folder, size and age."""
    import time

    from kiln.exporter.cache import cache_root, entries, size
    from kiln.exporter.progress import size_text

    found = entries()
    for path, manifest in found:
        targets = ", ".join(t["target"] for t in manifest.get("targets", ())) or "of another version of Kiln"
        days = (time.time() - path.stat().st_mtime) / 86400
        context = f", context {manifest['max_seq_len']}, {manifest['kv_cache']}" if manifest else ""
        click.echo(f"{path.name}  {size_text(size(path))}, {days:.0f} days, {targets}{context}")
    click.echo(f"{len(found)} in {cache_root()}", err=True)


@cache.command(name="clear")
@click.argument("names", nargs=-1)
def clear_cache(names: tuple[str, ...]) -> None:
    """Remove the named folders of kiln cache list, or all of them."""
    from kiln.exporter.cache import cache_root, clear
    from kiln.exporter.progress import size_text

    count, total = clear(names)
    click.echo(f"{count} removed from {cache_root()}, {size_text(total)}", err=True)


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--depths", metavar="N,N,...", help="Tokens in the caches.  [default: 128 and up in steps of 4; with --profile: 2048]")
@click.option("--prefill-chunk", type=click.IntRange(2), help="Tokens of the timed prefill call.  [default: the artifact's]")
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True, help="Decode steps timed at each depth.")
@drafts
@click.option("--prompt-file", type=PATH, help="With --draft: the text that is measured, as of kiln run.")
@click.option("--raw", is_flag=True, help="With --prompt-file: no chat template.")
@click.option("--max-new-tokens", type=click.IntRange(2), help="With --draft: tokens that are written.  [default: 128]")
@click.option("--draft-rates", metavar="F,F,...", help="Draft what will come, each place of a draft right as often, by a seeded coin.")
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--profile", is_flag=True, help="Instead: the time of a decode step and of a prefill call, kernel by kernel (GPU).")
@click.option("--rows", metavar="M,M,...", help="Instead: steps of as many tokens, of one session and of M sessions.")
@WEIGHTS
@click.option("--json", "as_json", is_flag=True, help="The record as JSON instead of a table.")
@click.option("--out", type=PATH, help="Write the record here, too.")
@click.option("--plot", "picture", type=PATH, help="Draw speed against depth into this file.")
def bench(as_json: bool, **options: Any) -> None:
    """Measure an artifact: prefill and decode at several depths, memory, share of what the device can do.

    With --draft or --draft-rates: the same text with and without drafts, the acceptance of each place, tokens a step, speed-up.
    """
    names = ("draft", "draft_length", "draft_rates", "prompt_file", "raw", "max_new_tokens")
    drafting = {name: options.pop(name) for name in names}
    from kiln.exporter.measure import bench as speed
    from kiln.exporter.measure import bench_command

    with working_folder():
        if drafting["draft"] == "off" and drafting["draft_rates"] is None:
            if given := [f"--{name.replace('_', '-')}" for name in names[1:] if drafting[name]]:
                raise click.UsageError(f"{given[0]} needs --draft or --draft-rates")
            record, text = bench_command.bench(**options)
        else:
            if any([options.pop(name) for name in ("profile", "picture", "rows")]):
                raise click.UsageError("--profile, --plot and --rows are not of texts with drafts; run them apart")
            record, text = speed.bench_drafts(**drafting, **options)
    click.echo(json.dumps(record, indent=1) if as_json else text)


main.add_command(bench_serve)
main.add_command(serve)


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
@WEIGHTS
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
