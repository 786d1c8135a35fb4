"""The options of `kiln bench-serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kiln.exporter.parameters import PATH, Float, Numbers
from kiln.exporter.temporary import working_folder


@click.command(name="bench-serve")
@click.argument("url")
@click.option("--users", type=Numbers(int), metavar="N,N,...", help="Closed loop: each of so many users asks again when answered.")
@click.option("--rate", "rates", type=Numbers(float), metavar="R,R,...", help="Open loop: so many conversations a second begin (Poisson).")
@click.option("--conversations", type=click.IntRange(1), default=32, show_default=True, help="At each load.")
@click.option("--seconds", type=Float(0, min_open=True), help="Begin none after so long, at each load.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of the first message; no two are alike.")
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option("--shared-prefix", type=click.IntRange(0), default=0, show_default=True, help="Tokens of a system prompt that all share.")
@click.option("--turns", type=click.IntRange(1), default=1, show_default=True, help="Requests of a conversation, each with all before it.")
@click.option("--turn-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of each message after the first.")
@click.option("--temperature", type=Float(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True, help="Ask for whole answers (an extension of most servers).")
@click.option("--max-ttft-ms", type=Float(0, min_open=True), help="Goodput: the first token within this.")
@click.option("--max-token-ms", type=Float(0, min_open=True), help="Goodput: a token of an answer, in the mean, within this.")
@click.option("--max-gap-ms", type=Float(0, min_open=True), help="Goodput: no gap between parts of an answer above this.")
@click.option("--model", help="Its name.  [default: the first that the server lists]")
@click.option("--key-file", type=PATH, help="A file with the key of the server.")
@click.option("--timeout", type=Float(0, min_open=True), default=600, show_default=True, help="Seconds of a whole answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the arrivals.")
@click.option("--json", "as_json", is_flag=True, help="The record as JSON instead of a table.")
@click.option("--out", type=PATH, help="Write the record here, too.")
@click.option("--plot", "picture", type=PATH, help="Draw throughput, first token and gaps against the load into this file.")
def bench_serve(
    url: str, users: list[int] | None, rates: list[float] | None, max_ttft_ms: float | None, max_token_ms: float | None,
    max_gap_ms: float | None, model: str | None, key_file: Path | None, timeout: float, as_json: bool, out: Path | None,
    picture: Path | None, **load: Any,
) -> None:  # fmt: skip
    """Measure any OpenAI-compatible server at URL under load: first token, gaps, tokens a second, goodput."""
    from kiln.exporter.measure import serve_bench as sb

    bounds = {"max_ttft": max_ttft_ms, "max_token_time": max_token_ms, "max_gap": max_gap_ms}
    load |= {name: bound / 1e3 for name, bound in bounds.items() if bound is not None}
    if users is None and rates is None:
        users = [1, 4, 8]
    with working_folder():
        record, text = sb.bench_serve(url, sb.Load(**load), users or (), rates or (), model, key_file, timeout, out, picture)
    click.echo(json.dumps(record, indent=1) if as_json else text)
    for note in sb.notes(record):
        click.echo(f"note: {note}", err=True)
