"""kiln-run: what it prints, its options, its exit codes; how loading and early launch show there."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess

import numpy as np

import kiln
from tests.conftest import kiln as command
from tests.runtime.toy import KILN_RUN, MAX_SEQ, PROMPT, TOLERANCE, VOCAB, WIDTH, change, eager, fails, ids, run


def test_run_json_and_logits_file(toy, device, tmp_path):
    want, rows = eager(PROMPT, 5)
    result = run(toy, "--tokens", ids(PROMPT), "--max-new-tokens", 5, "--prefill-chunk", 5, "--json", "--memory",
                 "--logits", tmp_path / "l.f32")
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    assert (out["prompt_tokens"], out["tokens"], out["stop"], out["device"][:4]) == (PROMPT, want, "length", device[:4])
    assert out["prefill_tok_s"] > 0 and out["decode_tok_s"] > 0 and out["ttft_s"] > 0 and out["load_s"] > 0
    assert out["memory"]["kv_global"] == 4 * MAX_SEQ * WIDTH and (out["memory_outside"] > 0) == (device == "cuda")
    written = np.fromfile(tmp_path / "l.f32", np.float32).reshape(-1, VOCAB)
    assert written.shape[0] == 2 + 4  # two prefill chunks, four decode steps
    np.testing.assert_allclose(written[1:], rows, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(np.array(out["logits"], np.float32), written)


def test_run_text(toy):
    result = run(toy, "--tokens", ids(PROMPT), "--max-new-tokens", 40)
    want = eager(PROMPT, MAX_SEQ - len(PROMPT) + 1)[0]
    assert result.returncode == 0 and result.stdout.split() == [str(t) for t in want]
    assert f"prefill {len(PROMPT)} tokens" in result.stderr and f"limit of {MAX_SEQ} tokens" in result.stderr


def test_loading_progress(toy, device):
    calls = []
    kiln.Model(str(toy), progress=lambda *call: calls.append(call))
    constants = json.loads((toy / "manifest.json").read_text())["constants"]
    total = max(c["offset"] + c["bytes"] for c in constants) - min(c["offset"] for c in constants)
    assert calls[0] == (0, total) and calls[-1] == (total, total) and calls == sorted(calls)

    command = (toy, "--tokens", "1", "--max-new-tokens", 1)
    assert len(re.findall(r"^weights: 0\.000 GB in \d+\.\d\d s, [\d.]+ GB/s$", run(*command).stderr, re.MULTILINE)) == 1
    assert "weights:" not in run(*command, "--json").stderr
    master, slave = pty.openpty()
    try:
        subprocess.run([KILN_RUN, *map(str, command)], stdout=subprocess.DEVNULL, stderr=slave, check=True)
        os.write(slave, b"end\n")
        shown = b""
        while not shown.endswith(b"end\r\n"):  # a terminal hands over what was written piece by piece
            shown += os.read(master, 1 << 16)
    finally:
        os.close(slave), os.close(master)
    shown = shown.decode()
    assert shown.startswith("\r\x1b[Kweights: 0.00 of 0.00 GB")
    assert re.search(r"\r\x1b\[Kweights: 0\.000 GB in \d+\.\d\d s, [\d.]+ GB/s\r$", shown.split("\n")[0])


def test_waits(copy, device):
    """Names that no kernel has change nothing; an empty one would change everything."""
    change(copy, lambda m: m["entry_points"]["decode"].update(waits=["no_such_kernel"]))
    session = kiln.Session(kiln.Model(str(copy)))
    assert session.early_launches == 0
    session.prefill(PROMPT)
    assert session.generate(6)[0] == eager(PROMPT, 6)[0]
    result = json.loads(run(copy, "--tokens", ids(PROMPT), "--max-new-tokens", 2, "--json", "--memory", "--no-early-launch").stdout)
    assert result["early_launches"] == 0
    assert "start early" in run(copy, "--tokens", "1", "--memory").stderr or device == "cpu"
    change(copy, lambda m: m["entry_points"]["decode"].update(waits=["gemv", ""]))
    fails("'waits': an empty name", copy, "--tokens", "1")
    change(copy, lambda m: m["entry_points"]["decode"].update(waits=[7]))
    fails("manifest.json", copy, "--tokens", "1")


def test_help_version_and_usage_errors(toy):
    shown = run("--help").stdout
    assert shown.startswith("usage: kiln-run ARTIFACT") and "KILN_FULL_STACK" in shown
    assert "artifact format 2" in run("--version").stdout
    fails("no artifact", code=2)
    fails("give one of --prompt", toy, code=2)
    fails("give one of --prompt", toy, "--prompt", "a", "--tokens", "1", code=2)
    fails("unknown option --promt", toy, "--promt", "a", code=2)
    fails("--top-k x", toy, "--tokens", "1", "--top-k", "x", code=2)
    assert run("-h").stdout == shown
    for device in ("gpu", "cuda:", "cuda:x", "CPU"):
        fails(f"--device {device}: must be", toy, "--tokens", "1", "--device", device, code=2)
    fails("--temperature nan", toy, "--tokens", "1", "--temperature", "nan", code=2)
    fails("--max-new-tokens 0", toy, "--tokens", "1", "--max-new-tokens", "0", code=2)
    fails("--tokens 1,,2", toy, "--tokens", "1,,2", code=2)
    fails("needs --tokenize-stdin", toy, "--tokens", "1", "--parse-special", code=2)


def test_drafts(three_rows, toy) -> None:
    """The same text, and how many tokens a step gave; measured as well, by what occurred before and by a coin."""
    prompt = ("--tokens", ids([9, 8, 7, 9, 8, 7, 9]), "--max-new-tokens", 30)
    plain, drafted = (json.loads(run(three_rows, *prompt, "--json", *options).stdout) for options in ((), ("--draft", "ngram")))
    assert plain["tokens"] == drafted["tokens"] and "drafts" not in plain
    counts = drafted["drafts"]
    assert counts["tokens"] == 29 == counts["steps"] + sum(counts["right"]) and counts["right"][0] > 0
    said = run(three_rows, *prompt, "--draft", "ngram").stderr
    assert re.search(r"^drafts: \d\.\d\d tokens a step, \d+ of \d+ drafts right \(\d\.\d\d", said, re.MULTILINE)

    (row,) = json.loads(run(three_rows, "--bench", "--json", "--draft", "ngram", *prompt).stdout)["drafts"]
    assert (row["depth"], row["tokens"]) == (7, 30) and row["counts"]["tokens"] == 29 and row["speed_up"] > 0
    rows = json.loads(run(three_rows, "--bench", "--json", "--draft-rates", "1,0.5", "--depths", "8,20", "--steps", 20).stdout)
    assert [(r["depth"], r["tokens"]) for r in rows["drafts"]] == [(8, 21), (20, 21)]
    for row in rows["drafts"]:
        counts = row["counts"]
        assert counts["right"][0] == counts["tried"][0] and 0 < counts["right"][1] < counts["tried"][1] and counts["tried"][2] == 0
    for options, words in (
        (("--draft", "magic", *prompt), "--draft magic: must be ngram, mtp or off"),
        (("--draft-length", 2, *prompt), "--draft-length needs --draft"),
        (("--draft-rates", "0.5", *prompt), "--draft-rates needs --bench"),
        (("--draft-rates", "0.5,2", "--bench"), "number 2 is not"),
        (("--draft", "ngram", "--bench"), "--bench with --draft measures a text"),
    ):
        fails(words, three_rows, *options, code=2)
    fails("no steps of several tokens", toy, *prompt, "--draft", "ngram")


def test_bench_of_drafts(three_rows, tmp_path) -> None:
    """`kiln bench`: the same text with and without, a row each with the acceptance of each place; what does not go together is told."""
    options = ("--draft-rates", "1,0.5", "--depths", "8,20", "--steps", 16, "--threads", 1, "--out", tmp_path / "r.json")
    said = command("bench", three_rows, *options).stdout
    assert [row["depth"] for row in json.loads((tmp_path / "r.json").read_text())["drafts"]] == [8, 20]
    assert re.search(r"^ +8 +17 .* 1\.00 0\.\d\d$", said, re.MULTILINE), said
    for bad in (("--draft-length", 2), ("--draft", "ngram", "--rows", "2")):
        assert command("bench", three_rows, *bad, check=False).returncode == 2
