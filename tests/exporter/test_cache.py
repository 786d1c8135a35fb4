"""`kiln run MODEL.gguf` and its cache: code is made once, whoever else wants it waits, and what is there is played."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click import UsageError
from gguf import GGUFValueType

from kiln.exporter import cache
from kiln.exporter.cache import CodeOptions, Wanted, wanted
from kiln.exporter.errors import KilnError
from kiln.exporter.run_gguf import parse, target
from kiln.exporter.tools.synth import write_synthetic
from tests.code_only import code_only
from tests.conftest import TEMPLATE, WAIT, kiln
from tests.gguf_files import WIDE, rewrite

TOKENS = ("--tokens", "2,5,9,11", "--max-new-tokens", 4, "--no-eog", "--device", "cpu")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(root, artifacts) -> Path:
    """An entry for WIDE, made without compiling."""
    root.mkdir()
    return code_only(artifacts["tq4"], WIDE, root / wanted(WIDE, CodeOptions("cpu")).name)


def test_what_is_there_is_played(root, filled, artifacts):
    want = kiln("run", artifacts["tq4"], *TOKENS).stdout
    assert kiln("run", WIDE, *TOKENS).stdout == want
    assert kiln("run", WIDE, *TOKENS, "--target", "cpu").stdout == want
    listed = kiln("cache", "list")
    assert filled.name in listed.stdout and "cpu, context 96, tq4" in listed.stdout and f"1 in {root}" in listed.stderr
    assert kiln("run", WIDE, *TOKENS, "--code", filled).stdout == want
    result = kiln("cache", "clear", "nothing", check=False)
    assert result.returncode == 1 and "nothing is not in" in result.stderr and filled.is_dir()
    (root / "mine").mkdir()
    (root / ".0123456789abcdef.lock").touch()  # of a process that was killed
    assert "1 removed" in kiln("cache", "clear").stderr
    assert [p.name for p in root.iterdir()] == ["mine"]


def test_talking_to_a_model_file(root, filled):
    """`kiln chat`, `kiln serve` and what of `kiln run` is played from Python take a model file as `kiln run` does."""
    (filled / "chat_template.jinja").write_text(TEMPLATE)
    manifest = json.loads((filled / "manifest.json").read_text())
    manifest["chat"] = {"prefix": "<bos>", "suffix": "<turn|>", "tokens": {"bos_token": "<bos>"}}
    (filled / "manifest.json").write_text(json.dumps(manifest))
    cpu = ("--device", "cpu", "--threads", 1)
    answer = kiln("run", WIDE, "--system", "b", "--prompt", "a", "--max-new-tokens", 3, *cpu).stdout.strip()
    assert answer == kiln("run", filled, "--weights", WIDE, "--system", "b", "--prompt", "a", "--max-new-tokens", 3, *cpu).stdout.strip()
    command = [sys.executable, "-m", "exporter", "chat", WIDE, "--system", "b", "--temperature", 0, "--max-new-tokens", 3, *cpu]
    done = subprocess.run(list(map(str, command)), input="a\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0 and answer in done.stdout, (done.stdout, done.stderr)
    command = [sys.executable, "-m", "exporter", "serve", WIDE, "--port", 0, *cpu]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        said = server.stdout.readline()
        server.terminate()
    assert said.startswith(f"serving {WIDE.stem} at http://127.0.0.1:") and server.returncode == 0
    for name in ("chat", "serve"):
        for given, told in (
            ((filled, "--max-seq-len", 64), "is of a model file"),
            ((filled, "--kv-cache", "tq4"), "is of a model file"),
            ((WIDE, "--weights", WIDE), "holds its own"),
        ):
            refused = kiln(name, *given, check=False)
            assert refused.returncode == 2 and told in refused.stderr, refused.stderr


@pytest.mark.flaky(reruns=2)  # a minute, on a machine that does other things
def test_another_tokenizer_takes_the_code_that_is_there(root, filled, tmp_path):
    other = rewrite(tmp_path / "m.gguf", set_keys={"tokenizer.ggml.eot_token_id": (GGUFValueType.UINT32, 9)})
    a, b = (wanted(path, CodeOptions("cpu")) for path in (WIDE, other))
    assert a.code == b.code and a.file != b.file
    start = time.monotonic()
    result = kiln("run", other, *TOKENS)
    assert "its code is there" in result.stderr and time.monotonic() - start < 60
    (made,) = set(root.iterdir()) - {filled}
    assert made.name == b.name and 9 in json.loads((made / "manifest.json").read_text())["tokenizer"]["eog"]
    assert (made / "model.pt2").samefile(filled / "model.pt2") and not any(f.is_symlink() for f in made.iterdir())
    assert "its code" not in kiln("run", other, *TOKENS).stderr


def test_keys(tmp_path):
    """What is compiled into the code changes its key; a name, or other weights, change nothing."""
    base = wanted(WIDE, CodeOptions("cpu"))
    named = rewrite(
        tmp_path / "named.gguf",
        set_keys={"general.name": (GGUFValueType.STRING, "Other name!"), "general.url": (GGUFValueType.STRING, "x")},
    )
    found = wanted(named, CodeOptions("cpu"))
    assert (found.code, found.file) == (base.code, base.file) and found.title == "Other-name-cpu"
    eps = rewrite(tmp_path / "eps.gguf", set_keys={"gemma4.attention.layer_norm_rms_epsilon": (GGUFValueType.FLOAT32, 1e-5)})
    codes = {
        wanted(path, CodeOptions("cpu")).code
        for path in (eps, *(WIDE.with_name(f"gemma4-tiny-dense-wide-{mix}.gguf") for mix in ("Q4_0", "Q6_K")))
    }
    codes |= {wanted(WIDE, o).code for o in (CodeOptions("sm_90"), CodeOptions("cpu", 64), CodeOptions("cpu", None, "tq4"))}
    assert len(codes | {base.code}) == 7
    assert wanted(rewrite(tmp_path / "bad.gguf", drop=["blk.0.attn_q.weight"]), CodeOptions("cpu")) is None
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-c", "import exporter.cache, exporter.run_gguf, sys; print(*sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    )  # what is there is played at once


def test_places(monkeypatch):
    monkeypatch.delenv("KILN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_root() == Path("/x/kiln")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/h")
    assert cache.cache_root() == Path("/h/.cache/kiln")
    monkeypatch.setenv("KILN_CACHE", "/own")
    assert cache.cache_root() == Path("/own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-seq-len", "8"), "a number of tokens, 16 or more"),
        (("--max-seq-len",), "--max-seq-len needs a value"),
        (("--kv-cache=q8",), "choose from f16, bf16, tq4"),
        (("--code", "d", "--target", "cpu"), "--target does not go with it"),
    ],
)
def test_wrong_use(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(("m.gguf", *arguments))


def test_command_line():
    request = parse(("m.gguf", "--prompt", "hi", "--max-seq-len=64", "--device", "cpu", "--", "--code"))
    assert request.own == {"--max-seq-len": "64"} and request.rest == ["--prompt", "hi", "--device", "cpu", "--", "--code"]
    assert target(request) == "cpu" and target(parse(("m.gguf", "--target", "sm_80"))) == "sm_80"
    with pytest.raises(KilnError, match="--device cuda:99: there is no such GPU here"):
        target(parse(("m.gguf", "--device=cuda:99")))
    result = kiln("run", "missing.gguf", "--prompt", "x", check=False)
    assert result.returncode == 1 and "missing.gguf: no such file" in result.stderr
    result = kiln("run", "missing.gguf", "--kv-cache", "x", check=False)
    assert result.returncode == 2 and "choose from" in result.stderr


def test_wrong_use_of_the_runner_is_told_before_anything_is_compiled(root):
    for wrong in ((), ("--prompt", "x", "--bogus"), ("--prompt", "x", "--temperature", "nan"), ("--prompt", "x", "--tokens", "1")):
        result = kiln("run", WIDE, *wrong, check=False)
        assert result.returncode == 2 and result.stderr.startswith("kiln-run: error: ") and result.stderr.count("\n") == 1, result.stderr
    result = kiln("run", WIDE, "--help")
    assert "--prompt TEXT" in result.stdout and not root.exists()


def test_an_unsound_file_is_told_in_full(root, tmp_path):
    result = kiln("run", rewrite(tmp_path / "bad.gguf", drop=["blk.0.attn_q.weight"]), *TOKENS, check=False)
    assert result.returncode == 1 and "tensor blk.0.attn_q.weight is missing" in result.stderr and result.stderr.count("\n") == 1
    assert not root.exists()


HOLD = """
import sys, time
from kiln.exporter.cache import Wanted, making
with making(Wanted("m", "c" * 16, "f" * 16)) as place:
    print("made" if place.exists() else "making", flush=True)
    sys.stdin.readline()
    place.mkdir(exist_ok=True)
"""


def test_one_makes_it_and_others_wait(root):
    """Also where the one that makes it is killed; the lock leaves no file."""
    start = lambda: subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, stderr=-1, text=True)  # noqa: E731
    for kill in (True, False):
        first = start()
        assert first.stdout.readline() == "making\n"
        second = start()
        assert "another process is compiling" in second.stderr.readline()
        assert second.poll() is None
        first.kill() if kill else first.communicate("\n")
        assert second.stdout.readline() == ("making\n" if kill else "made\n")
        if kill:
            second.kill()
        else:
            second.communicate("\n")
        first.wait(), second.wait()
    assert [p.name for p in root.iterdir()] == [Wanted("m", "c" * 16, "f" * 16).name]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "file" / "cache"))
    with (
        pytest.raises(KilnError, match="compiled code cannot be kept there: .*; name another folder in KILN_CACHE"),
        cache.making(Wanted("m", "c", "f")),
    ):
        pass


def test_from_nothing(root, tmp_path):
    """Two processes at once compile a model once, and both play it; a file of another seed is played by the same code, also where it
    was moved to; a signal in the middle leaves nothing."""
    files = [tmp_path / f"{seed}.gguf" for seed in range(2)]
    for seed, file in enumerate(files):
        write_synthetic(file, "tiny", "q4_k_m", seed, layers=2)
    command = [sys.executable, "-m", "exporter", "run", str(files[0]), *map(str, TOKENS), "--max-seq-len", "48"]
    interrupted = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    while "compiling for cpu, once" not in (line := interrupted.stderr.readline()):
        assert line
    time.sleep(2)
    interrupted.terminate()
    assert interrupted.wait(WAIT) == 128 + 15 and list(root.iterdir()) == []
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    results = [process.communicate() for process in both]
    assert all(process.returncode == 0 for process in both), results
    assert results[0][0] == results[1][0] and sum("compiling for cpu, once" in err for _, err in results) == 1, results
    (entry,) = root.iterdir()
    second = subprocess.run(command[:4] + [str(files[1])] + command[5:], capture_output=True, text=True)
    assert second.returncode == 0 and "compil" not in second.stderr and list(root.iterdir()) == [entry]
    assert second.stdout != results[0][0]
    assert sum(f.stat().st_size for f in entry.iterdir()) < 4 << 20
    moved = Path(shutil.move(entry, tmp_path / "elsewhere"))
    assert kiln(*command[3:], "--code", moved, check=False).returncode == 2  # with --max-seq-len
    assert kiln(*command[3:-2], "--code", moved).stdout == results[0][0]
    assert os.listdir(root) == []
