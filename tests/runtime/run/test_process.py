"""kiln-run as a process: signals, pipes, how text comes in and goes out, hostile arguments."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import termios
import time
from array import array
from pathlib import Path

import pytest

from tests.conftest import WAIT
from tests.runtime.toy import CHUNK, KILN_RUN, MAX_SEQ, PROMPT, VOCAB, change, eager, fails, ids, run

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
PIPE_BYTES = 4096


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Every byte and <bos>, no merges."""
    texts = ["<bos>", *(f"<0x{b:02X}>" for b in range(256))]
    document = {
        "added_tokens": [{"id": 0, "content": "<bos>", "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated"}, "post_processor": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {t: i for i, t in enumerate(texts)}, "merges": []},
    }
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path


def start(*arguments: object, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([KILN_RUN, *map(str, arguments), "--threads", "1"], text=True, **pipes)


def catches(process: subprocess.Popen, sent: int) -> bool:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return bool(int(next(x for x in lines if x.startswith("SigCgt")).split()[1], 16) >> (sent - 1) & 1)


def until(condition) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sent, code", SIGNALS)
def test_a_signal_while_text_is_awaited(toy, tokenizer, sent, code):
    for arguments in ((toy, "--prompt-file", "-"), (tokenizer, "--tokenize-stdin")):
        process = start(*arguments)
        until(lambda p=process: catches(p, sent))
        process.send_signal(sent)
        assert process.communicate(timeout=WAIT) == ("", "") and process.returncode == code


@pytest.mark.parametrize("sent, code", SIGNALS)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_while_tokens_are_made(toy, tmp_path, sent, code, as_json):
    """A pipe that takes the logits stops the run in the middle; what was made until then comes out, with the figures."""
    pipe = tmp_path / "logits"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(reader, True)
    process = start(toy, "--tokens", ids(PROMPT), "--prefill-chunk", 1, "--logits", pipe, *(["--json"] if as_json else []))
    waiting = array("i", [0])
    until(lambda: fcntl.ioctl(reader, termios.FIONREAD, waiting) == 0 and waiting[0] == 16 * 4 * VOCAB)  # a 17th does not fit
    process.send_signal(sent)
    time.sleep(0.1)
    while os.read(reader, 1 << 16):
        pass
    os.close(reader)
    out, err = process.communicate(timeout=WAIT)
    want = eager(PROMPT, 9)[0]  # the 17th row is that of the eighth step
    assert process.returncode == code
    if as_json:
        made = json.loads(out)
        assert made["stop"] == "interrupted" and made["tokens"] == want
    else:
        assert "stop: interrupted" in err and "decode 9 tokens" in err and "error" not in err
        assert out == " ".join(map(str, want)) + "\n"


def test_an_ignored_signal_stays_ignored(tokenizer):
    """nohup and a shell's `&` start programs so."""
    process = start(tokenizer, "--tokenize-stdin", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate("ab", timeout=WAIT) == ("98 99\n", "") and process.returncode == 0


@pytest.mark.parametrize("restore", [True, False])
def test_a_closed_pipe_ends_quietly(toy, tokenizer, restore):
    read, write = os.pipe()
    os.close(read)
    for arguments, text in (((toy, "--tokens", ids(PROMPT)), ""), ((tokenizer, "--tokenize-stdin"), "x" * 100), (("--help",), "")):
        process = start(*arguments, stdout=write, restore_signals=restore)
        assert process.communicate(text, timeout=WAIT)[1] == "" and process.returncode == 128 + signal.SIGPIPE
    os.close(write)


def test_standard_output_that_is_full(toy):
    with open("/dev/full", "w") as full:
        process = start(toy, "--tokens", ids(PROMPT), stdout=full)
        assert process.communicate(timeout=WAIT)[1] == "kiln-run: error: standard output: No space left on device\n"
    assert process.returncode == 1


def test_killed_at_any_moment_nothing_stays(toy, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(folder)}
    begin = time.monotonic()
    assert start(toy, "--tokens", ids(PROMPT), env=environment).wait() == 0
    whole, g = time.monotonic() - begin, random.Random(1)
    for sent, code in SIGNALS * 5:
        process = start(toy, "--tokens", ids(PROMPT), env=environment)
        time.sleep(g.uniform(0, whole))
        process.send_signal(sent)
        process.communicate(timeout=WAIT)
        assert process.returncode in (0, code, -sent)  # -sent: before the first line of main()
        assert not list(folder.iterdir())


@pytest.mark.parametrize("way", ["file", "-", "/dev/stdin", "fifo", "bom"])
def test_every_way_a_shell_hands_over_text(copy, tokenizer, tmp_path, way):
    text = "grüße aus der Höhle der Füchse 🦊\n"
    (copy / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    change(copy, lambda m: m.update(tokenizer={"file": "tokenizer.json", "bos": None, "eog": []}))
    for point in ("prefill", "decode"):
        change(copy, lambda m, p=point: m["entry_points"][p]["outputs"][1].update(shape=[1, 257]))
    path = tmp_path / "prompt"
    if way == "fifo":
        os.mkfifo(path)
    else:
        path.write_text("\ufeff" * (way == "bom") + text)
    name = way if way in ("-", "/dev/stdin") else path
    with open(os.devnull if way == "fifo" else path) as stdin:
        process = start(copy, "--prompt-file", name, "--raw", stdin=stdin, env=os.environ | {"LC_ALL": "C"})
        if way == "fifo":
            path.write_text(text)
        out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1 and f"the prompt has {len(text.encode())} tokens, the artifact holds {MAX_SEQ};" in err, (out, err)


def test_text_that_cannot_be_read(toy, tmp_path):
    fails("cannot open", toy, "--prompt-file", tmp_path / "none")
    fails("cannot open: No such file", toy, "--prompt-file", "")
    fails("is a directory", toy, "--prompt-file", tmp_path)
    (tmp_path / "utf16").write_text("hello", encoding="utf-16")
    fails("is UTF-16 text; save it as UTF-8", toy, "--prompt-file", tmp_path / "utf16")


def test_hostile_arguments(toy, copy):
    digits = ("", ",", "1,", ",1", "1,,2", "1 ,2", " 1", "+1", "0x1", "1.0", "1e3", "٣", "9" * 20, "1\n2", "\x1b[31m", "-", "--")
    for tokens in digits:
        fails("--tokens", toy, "--tokens", tokens, code=2)
    for tokens in ("-1", "9223372036854775807", "-9223372036854775808", "61"):
        fails("is outside of the vocabulary of 61", toy, "--tokens", tokens)
    fails(f"the artifact holds {MAX_SEQ}", toy, "--tokens", ids([1] * 60_000))
    long = run(toy, "--tokens", "1," * 60_000)
    assert long.returncode == 2 and len(long.stderr) < 300
    assert "... (120000 characters): must be integers separated by commas, number 60001 is not" in long.stderr
    odd = subprocess.run([KILN_RUN, toy, "--tokens", b"\xff\x1b\n"], capture_output=True)
    assert (odd.returncode, odd.stderr.count(b"\n"), b"\x1b" in odd.stderr) == (2, 1, False) and "\ufffd" in odd.stderr.decode()
    fails("--temperature -1: must be a number of 0 or more", toy, "--tokens", "1", "--temperature", "-1", code=2)
    fails("--temperature inf", toy, "--tokens", "1", "--temperature", "inf", code=2)
    fails("--top-p 1.5: must be a number from 0 to 1", toy, "--tokens", "1", "--top-p", "1.5", code=2)
    fails("--top-p 0", toy, "--tokens", "1", "--top-p", "0", code=2)
    assert "--tokens needs a value: 1,2,3" in subprocess.run([KILN_RUN, toy, "--tokens"], capture_output=True, text=True).stderr
    fails("takes no value", toy, "--tokens", "1", "--json=yes", code=2)
    assert "--json: no such directory" in subprocess.run([KILN_RUN, "--tokens", "1", "--", "--json"], capture_output=True, text=True).stderr
    strange = copy.rename(copy.parent / "-ein Ordner mit 'ü' \U0001f98a")
    command = [KILN_RUN, "--tokens", ids(PROMPT[:CHUNK]), "--json", "--", strange.name]
    result = subprocess.run(command, cwd=strange.parent, capture_output=True, text=True)
    assert result.returncode == 0 and json.loads(result.stdout)["tokens"], result.stderr
