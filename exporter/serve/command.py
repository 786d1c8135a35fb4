"""The options of `kiln serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from kiln.exporter.errors import KilnError
from kiln.exporter.parameters import DEVICE, PATH, Float, is_model_file, of_what_is_played


@click.command()
@click.argument("artifact", metavar="ARTIFACT|GGUF", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free, which is printed.")
@click.option("--sessions", type=click.IntRange(1, 1024), help="Answers at once, each with its caches.  [default: the artifact's --rows]")
@click.option("--queue", type=click.IntRange(0, 100_000), default=64, show_default=True, help="Requests that may wait; more are refused.")
@click.option("--prefill-chunk", type=click.IntRange(2), help="Tokens of a prompt between two steps of others.  [default: the artifact's]")
@click.option(
    "--max-gap-ms", type=Float(0), default=0.0,
    help="What prompts may take between two steps of others, where the artifact has rows; a chunk is read at least.",
)  # fmt: skip
@click.option(
    "--run-ahead/--no-run-ahead", default=None,
    help="Queue a step before the tokens of the one before are looked at, where the artifact has rows.  [default: on a GPU]",
)  # fmt: skip
@click.option(
    "--snapshot-device-gib", type=Float(0, 1 << 20),
    help="Memory of the GPU for snapshots at cuts of prompts.  [default: 16, or a quarter of what is free]",
)
@click.option(
    "--snapshot-host-gib", type=Float(0, 1 << 20),
    help="The same of the host; on the CPU the only one.  [default: where that of the GPU is below 4, 8 or an eighth of the memory]",
)
@click.option("--timeout", type=Float(0), default=0.0, help="Longest time of an answer, waiting included, in seconds; 0: none.")
@click.option("--drain", type=Float(0), default=10.0, show_default=True, help="Seconds that answers may go on after a signal.")
@click.option("--alias", "names", multiple=True, metavar="NAME", help="The model's name; repeatable.  [default: the folder's]")
@click.option("--any-model", is_flag=True, help="Answer to every name.")
@click.option("--api-keys", type=PATH, metavar="FILE", help="Ask for a key of this file, which has one a line.")
@click.option("--cors-origins", multiple=True, metavar="ORIGIN", help="Let pages of https://example.org ask; repeatable.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="On loopback, another Host header than localhost; repeatable.")
@click.option("--max-body-mib", type=click.IntRange(1, 1024), default=8, show_default=True, help="Largest body of a request.")
@click.option("--think/--no-think", default=None, help="Where a request does not say.  [default: as the chat template does]")
@click.option(
    "--reasoning-field", type=click.Choice(["reasoning_content", "reasoning"]), default="reasoning_content", show_default=True,
    help="Where chat completions put thoughts.",
)  # fmt: skip
@click.option("--metrics-prefix", type=click.Choice(["kiln", "vllm"]), default="kiln", show_default=True, help="Of the names in /metrics.")
@click.option("--log-requests", is_flag=True, help="A line for each request: method, address, status, time; never a prompt.")
@of_what_is_played
@DEVICE
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
def serve(
    artifact: Path, host: str, port: int, sessions: int | None, prefill_chunk: int | None, names: tuple[str, ...], api_keys: Path | None,
    cors_origins: tuple[str, ...], allow_host: tuple[str, ...], max_body_mib: int, snapshot_device_gib: float | None,
    snapshot_host_gib: float | None, log_requests: bool, device: str, threads: int | None, weights: Path | None, max_seq_len: int | None,
    kv_cache: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Answer over HTTP, in the forms of OpenAI's and Anthropic's interfaces, from an artifact or a model file, whose code is compiled once
    and kept."""
    from kiln.exporter.run_gguf import played

    try:
        from kiln.exporter.serve.server import loopback, read_keys
        from kiln.exporter.serve.server import serve as run_server
        from kiln.exporter.serve.settings import Settings
    except ImportError as e:
        raise KilnError(f"the server's packages are not installed ({e}); pip install 'kiln-export[serve]'") from e
    if not all(names):
        raise click.BadParameter("a name may not be empty", param_hint="--alias")
    for origin in cors_origins:  # as browsers send it, or no page would ever be let
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            raise click.BadParameter(f"{origin!r} is no origin such as https://example.org", param_hint="--cors-origins")
    for name in allow_host:
        if not re.fullmatch(r"[^/:\[\]\s]+|[0-9A-Fa-f:.]+", name):
            raise click.BadParameter(f"{name!r} is no name of a host, without scheme and port", param_hint="--allow-host")
    settings = Settings(
        names=names or ((artifact.stem if is_model_file(artifact) else artifact.resolve().name) or "kiln",),
        sessions=sessions or 0,
        chunk=prefill_chunk or 0,
        keys=read_keys(api_keys) if api_keys else (),
        origins=cors_origins,
        hosts=("localhost", "127.0.0.1", "::1", *(h.lower() for h in allow_host)) if loopback(host) else None,
        snapshots=(
            None if snapshot_device_gib is None else int(snapshot_device_gib * (1 << 30)),
            None if snapshot_host_gib is None else int(snapshot_host_gib * (1 << 30)),
        ),
        body=max_body_mib << 20,
        log=log_requests,
        **options,
    )
    artifact, weights = played(artifact, device, weights, max_seq_len, kv_cache)
    run_server(artifact, host, port, device, threads, settings, weights)
