"""The runner on a toy artifact: two compiled models over shared weights and caches, without the exporter.

Every test runs on the CPU and, marked gpu, on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import kiln
import numpy as np
import pytest
import torch

KILN_RUN = Path(sys.executable).parent / "kiln-run"
VOCAB, WIDTH, WINDOW, MAX_SEQ, CHUNK = 61, 8, 4, 24, 12
ALIGN = 256
TOLERANCE = 1e-5  # of logits below 1
PROMPT = [3, 17, 42, 8, 60, 0, 25, 33, 9]


class Toy(torch.nn.Module):
    """A chunk-invariant next-token function of every token in a global cache and of the last WINDOW ones in a ring."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        # Exact in bfloat16: the compiler skips the rounding of a ring value it has just written.
        self.register_buffer("embed", torch.randn(VOCAB, WIDTH, generator=g).to(torch.bfloat16).float())
        self.register_buffer("head", torch.randn(WIDTH, VOCAB, generator=g).to(torch.bfloat16))
        self.register_buffer("decay", torch.randint(1, 9, (MAX_SEQ,), generator=g, dtype=torch.int32))
        self.register_buffer("ring", torch.zeros(WINDOW, WIDTH, dtype=torch.bfloat16))
        self.register_buffer("cache", torch.zeros(MAX_SEQ, WIDTH))

    def forward(self, tokens, pos, temperature, top_k, top_p, seed):
        x = self.embed[tokens]  # [T, WIDTH]
        first, last = pos[0], pos[-1]
        self.cache.index_copy_(0, pos, x)
        slot = torch.arange(WINDOW, device=pos.device)
        held = last - (last - slot) % WINDOW  # the newest position of each slot
        fresh = (held >= first).unsqueeze(1)
        self.ring.copy_(torch.where(fresh, x[(held - first).clamp(min=0)].to(torch.bfloat16), self.ring))
        past = (torch.arange(MAX_SEQ, device=pos.device) <= last).float() / self.decay
        h = (self.cache * past.unsqueeze(1)).sum(0) + 3 * self.ring.float().sum(0)
        logits = torch.tanh(h @ self.head.float() / 64).unsqueeze(0)  # [1, VOCAB]
        shift = torch.where(temperature > 0, seed + top_k + (top_p * 0).long(), 0)
        return (logits.argmax(-1) + shift) % VOCAB, logits


def compile_toy(path: Path, device: str) -> None:
    from torch._inductor.package import package_aoti

    options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True,
               "compile_threads": 1}
    files = {}
    for name, t in (("prefill", 3), ("decode", 1)):
        inputs = tuple(x.to(device) for x in (torch.arange(t), torch.arange(t), *sampling_tensors()))
        length = {0: torch.export.Dim("T", min=2, max=CHUNK)} if t > 1 else None
        exported = torch.export.export(Toy().to(device), inputs, dynamic_shapes=(length, length, None, None, None, None))
        files[name] = torch._inductor.aot_compile(exported.module(), inputs, options=options)
    package_aoti(str(path), files)


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> list[dict]:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}
    header, data, constants = {}, b"", []
    for i, (name, t) in enumerate(tensors.items()):
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        constants.append({"name": name, "dtype": str(t.dtype)[6:], "shape": list(t.shape), "offset": len(data), "bytes": len(raw),
                          "sha256": hashlib.sha256(raw).hexdigest()})
        data += raw
        if pad := -len(data) % ALIGN:
            header[f"__pad.{i}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [len(data), len(data) + pad]}
            data += bytes(pad)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for c in constants:
        c["offset"] += 8 + len(text)
    return constants


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def toy(device, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "artifact"
    root.mkdir()
    compile_toy(root / "model.pt2", device)
    capability = list(torch.cuda.get_device_capability()) if device == "cuda" else None
    buffers = dict(Toy().named_buffers())
    caches = {name: buffers.pop(name) for name in ("ring", "cache")}
    package = (root / "model.pt2").read_bytes()
    constants = write_weights(root / "weights.safetensors", buffers)
    inputs = [("tokens", "int64"), ("pos", "int64"), ("temperature", "float32"), ("top_k", "int32"), ("top_p", "float32"),
              ("seed", "int64")]

    def entry(length):
        return {"inputs": [{"name": n, "dtype": d, "shape": [length] if n in ("tokens", "pos") else [1]} for n, d in inputs],
                "outputs": [{"name": "token", "dtype": "int64", "shape": [1]}, {"name": "logits", "dtype": "float32", "shape": [1, VOCAB]}]}

    manifest = {
        "format": "kiln", "format_version": 1, "producer": {"kiln": "0.1.0", "torch": torch.__version__.split("+")[0], "triton": "0"},
        "source": {"file": "toy.gguf", "architecture": "toy", "name": "toy"}, "config": {}, "max_seq_len": MAX_SEQ, "prefill_chunk": CHUNK,
        "activation_dtype": "float32", "kv_cache": "float32", "passes": [], "quantization": [],
        "targets": [{"target": "sm_{}{}".format(*capability) if capability else "cpu", "file": "model.pt2", "device": device,
                     "compute_capability": capability, "bytes": len(package), "sha256": hashlib.sha256(package).hexdigest()}],
        "entry_points": {"prefill": entry("T"), "decode": entry(1)}, "constants": constants,
        "kv": [{"name": n, "layer": i, "kind": "ring" if n == "ring" else "global", "dtype": str(t.dtype)[6:], "shape": list(t.shape),
                "bytes": t.nbytes} for i, (n, t) in enumerate(caches.items())],
        "weights": {"file": "weights.safetensors", "bytes": (root / "weights.safetensors").stat().st_size}, "tokenizer": None, "chat": None,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def copy(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "artifact"))


def change(root: Path, edit) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    edit(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def sampling_tensors(temperature=0.0, top_k=0, top_p=1.0, seed=0):
    return torch.tensor([temperature]), torch.tensor([top_k], dtype=torch.int32), torch.tensor([top_p]), torch.tensor([seed])


def eager(prompt: list[int], n: int, sampling=None) -> tuple[list[int], np.ndarray]:
    """n tokens after the prompt and the logits [n, VOCAB] they were taken from, by the module itself."""
    model, tokens, rows, fed = Toy(), [], [], 0
    feed = list(prompt)
    for _ in range(n):
        token, logits = model(torch.tensor(feed), torch.arange(fed, fed + len(feed)), *(sampling or sampling_tensors()))
        fed += len(feed)
        feed = [int(token)]
        tokens += feed
        rows.append(logits[0].numpy())
    return tokens, np.stack(rows)


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([KILN_RUN, *map(str, arguments), "--threads", "1"], capture_output=True, text=True)


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def fails(message: str, *arguments: object, code: int = 1) -> None:
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("kiln-run: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr, result.stderr


# What runs


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 9, CHUNK])
def test_tokens_and_logits_equal_eager_at_every_chunk(toy, chunk):
    want, rows = eager(PROMPT, 8)
    session = kiln.Session(kiln.Model(str(toy)), prefill_chunk=chunk)
    seen = []
    session.set_logits_sink(seen.append)
    assert session.prefill(PROMPT) == want[0]
    assert session.position == len(PROMPT) and len(seen) == -(-len(PROMPT) // chunk)
    tokens, stop = session.generate(8)
    assert (tokens, stop) == (want, "length")
    np.testing.assert_allclose(np.stack(seen[-8:]), rows, rtol=0, atol=TOLERANCE)
    assert len({tuple(r.argsort()[-3:]) for r in rows}) > 3  # the toy's logits do move


def test_decode_step_by_step_and_forced(toy):
    want, rows = eager(PROMPT, 6)
    session = kiln.Session(kiln.Model(str(toy)))
    got = [session.prefill(PROMPT)] + [session.decode() for _ in range(5)]
    assert got == want
    np.testing.assert_allclose(session.logits(), rows[-1], rtol=0, atol=TOLERANCE)
    forced = kiln.Session(kiln.Model(str(toy)))
    forced.prefill(PROMPT[:4])
    for token in PROMPT[4:]:
        last = forced.decode(token)
    assert last == want[0]
    np.testing.assert_allclose(forced.logits(), rows[0], rtol=0, atol=TOLERANCE)


def test_generate_goes_on_where_it_stopped(toy):
    want, _ = eager(PROMPT, 9)
    session = kiln.Session(kiln.Model(str(toy)))
    session.prefill(PROMPT)
    first, stop = session.generate(4)
    assert stop == "length" and session.position == len(PROMPT) + 3
    left = iter([True, None, False])  # only False stops
    second, stop = session.generate(9, lambda token: next(left))
    assert stop == "callback" and first + second == want[:7]
    assert first + second + session.generate(2)[0] == want


def test_steps_in_flight_are_discarded(toy, device):
    """On a GPU a step runs ahead of the token that ends a generation; what follows must not notice."""
    want, rows = eager(PROMPT, 4)
    after, _ = eager(PROMPT + want[:1] + [50, 51, 52, 53, 54], 5)
    for graph in (True, False):
        session = kiln.Session(kiln.Model(str(toy)), graph=graph)
        session.prefill(PROMPT)
        assert session.generate(10, lambda token: False) == (want[:1], "callback")
        session.generate(2)
        assert session.position == len(PROMPT) + 2
        session.reset()
        session.prefill(PROMPT)
        left = iter([True, False])
        assert session.generate(10, lambda token, left=left: next(left)) == (want[:2], "callback")
        assert session.position == len(PROMPT) + 1
        if device == "cuda":
            with pytest.raises(kiln.Error, match="discarded"):
                session.logits()
        else:
            np.testing.assert_allclose(session.logits(), rows[1], rtol=0, atol=TOLERANCE)
        session.prefill([50, 51, 52, 53, 54])
        assert session.generate(5)[0] == after
        with pytest.raises(ZeroDivisionError):
            session.generate(9, lambda token: 1 // 0)
        assert session.position == len(PROMPT) + 1 + 5 + 4 + 1
    with pytest.raises(kiln.Error, match="max_new_tokens"):
        session.generate(0)


def test_reset_and_sessions_do_not_bleed(toy):
    model = kiln.Model(str(toy))
    other = [11, 12, 13, 14, 15]
    a, b = kiln.Session(model), kiln.Session(model)
    a.prefill(PROMPT)
    b.prefill(other)
    mixed_a, mixed_b = [], []
    for _ in range(6):
        mixed_a.append(a.decode())
        mixed_b.append(b.decode())
    assert mixed_a == eager(PROMPT, 7)[0][1:] and mixed_b == eager(other, 7)[0][1:]
    a.reset()
    assert a.position == 0
    with pytest.raises(kiln.Error, match="no logits"):
        a.logits()
    with pytest.raises(kiln.Error, match="before prefill"):
        a.decode()
    assert [a.prefill(other), *(a.decode() for _ in range(6))] == eager(other, 7)[0]
    a.reset()
    for session in (a, kiln.Session(model)):  # too short to overwrite a ring that reset or, on a GPU, the warm-up left filled
        session.prefill(PROMPT[:2])
        np.testing.assert_allclose(session.logits(), eager(PROMPT[:2], 1)[1][0], rtol=0, atol=TOLERANCE)


def test_sessions_in_threads(toy):
    model, results = kiln.Model(str(toy)), {}

    def work(i: int) -> None:
        prompt = PROMPT[i:]
        session = kiln.Session(model)
        session.prefill(prompt)
        results[i] = session.generate(10)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: eager(PROMPT[i:], 10)[0] for i in range(4)}


def test_sampling_inputs_reach_both_models(toy):
    session = kiln.Session(kiln.Model(str(toy)))
    session.set_sampling(temperature=0.5, top_k=3, top_p=0.9, seed=7)
    want, _ = eager(PROMPT, 5, sampling_tensors(0.5, 3, 0.9, 7))
    assert want != eager(PROMPT, 5)[0]
    session.prefill(PROMPT)
    assert session.generate(5)[0] == want
    for bad in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(kiln.Error, match=next(iter(bad))):
            session.set_sampling(**bad)


def test_limit_of_max_seq_len(toy):
    session = kiln.Session(kiln.Model(str(toy)))
    full = (PROMPT * 3)[:MAX_SEQ]
    with pytest.raises(kiln.Error, match=f"{MAX_SEQ + 1} tokens.* holds {MAX_SEQ}"):
        session.prefill([*full, 1])
    assert session.position == 0
    first = session.prefill(full)
    assert session.generate(5) == ([first], "max_seq_len")
    with pytest.raises(kiln.Error, match="full"):
        session.decode()
    session.reset()
    session.prefill(PROMPT)
    tokens, stop = session.generate(100)
    assert (tokens, stop) == (eager(PROMPT, MAX_SEQ - len(PROMPT) + 1)[0], "max_seq_len")
    for bad in ([VOCAB], [-1], []):
        with pytest.raises(kiln.Error):
            session.prefill(bad)


def test_memory_and_properties(toy, device):
    model = kiln.Model(str(toy), verify=True)
    memory = kiln.Session(model).memory()
    assert memory["weights"] == 4 * VOCAB * WIDTH + 2 * WIDTH * VOCAB + 4 * MAX_SEQ
    assert (memory["kv_ring"], memory["kv_global"]) == (2 * WINDOW * WIDTH, 4 * MAX_SEQ * WIDTH)
    assert memory["total"] == sum(memory[k] for k in memory if k != "total")
    assert (memory["activations"] > 0) == (device == "cuda")
    assert model.device == {"cpu": "cpu", "cuda": "cuda:0"}[device] and model.target == model.manifest["targets"][0]["target"]
    assert (model.vocab_size, model.max_seq_len, model.prefill_chunk) == (VOCAB, MAX_SEQ, CHUNK)
    assert model.manifest["source"]["architecture"] == "toy"
    with pytest.raises(kiln.Error, match="no tokenizer"):
        model.encode_prompt("x")
    with pytest.raises(kiln.Error, match="prefill chunk 13"):
        kiln.Session(model, prefill_chunk=CHUNK + 1)


def test_end_of_generation_tokens_stop(copy):
    want, _ = eager(PROMPT, 8)
    stop_at = next(t for t in want[2:] if t not in want[:2])
    texts = ["<bos>"] + [f"t{i}" for i in range(1, VOCAB)]
    vocab = {t: i for i, t in enumerate(texts)} | {f"<0x{b:02X}>": VOCAB + b for b in range(256)}
    document = {
        "added_tokens": [{"id": 0, "content": "<bos>", "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated"}, "post_processor": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []},
    }
    (copy / "tokenizer.json").write_text(json.dumps(document))
    change(copy, lambda m: m.update(tokenizer={"file": "tokenizer.json", "bos": None, "eog": [stop_at]}))
    fails(f"the tokenizer has {len(vocab)} tokens, the model {VOCAB}", copy, "--tokens", "1")
    for point in ("prefill", "decode"):  # the token ids of the toy stay below VOCAB: only the manifest's figure grows
        change(copy, lambda m, p=point: m["entry_points"][p]["outputs"][1].update(shape=[1, len(vocab)]))
    before = want[:want.index(stop_at)]
    result = json.loads(run(copy, "--tokens", ids(PROMPT), "--json").stdout)
    assert (result["tokens"], result["stop"], result["text"]) == (before, "eog", "".join(texts[t].replace("<bos>", "") for t in before))
    result = json.loads(run(copy, "--tokens", ids(PROMPT), "--json", "--no-eog", "--max-new-tokens", 8).stdout)
    assert (result["tokens"], result["stop"]) == (want, "length")


# kiln-run


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
        shown = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave), os.close(master)
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
    assert run("--help").stdout.startswith("usage: kiln-run ARTIFACT")
    assert "artifact format 1" in run("--version").stdout
    fails("no artifact", code=2)
    fails("give one of --prompt", toy, code=2)
    fails("give one of --prompt", toy, "--prompt", "a", "--tokens", "1", code=2)
    fails("unknown option --promt", toy, "--promt", "a", code=2)
    fails("--top-k x", toy, "--tokens", "1", "--top-k", "x", code=2)
    fails("--temperature nan", toy, "--tokens", "1", "--temperature", "nan", code=2)
    fails("--max-new-tokens 0", toy, "--tokens", "1", "--max-new-tokens", "0", code=2)
    fails("--tokens 1,,2", toy, "--tokens", "1,,2", code=2)
    fails("needs --tokenize-stdin", toy, "--tokens", "1", "--parse-special", code=2)


# What is refused


def test_not_an_artifact(toy, tmp_path):
    fails("no such directory", tmp_path / "missing", "--tokens", "1")
    fails("it has no manifest.json", tmp_path, "--tokens", "1")
    fails("has no tokenizer", toy, "--prompt", "hello")
    fails("30 tokens, the artifact holds 24", toy, "--tokens", ids([1] * 30))
    fails("token 61 is outside", toy, "--tokens", "61")


def test_other_format_version(copy):
    change(copy, lambda m: m.update(format_version=2))
    fails("the artifact has format version 2, this runner reads 1", copy, "--tokens", "1")
    change(copy, lambda m: m.update(format="other"))
    fails("not a kiln artifact", copy, "--tokens", "1")
    (copy / "manifest.json").write_text("{")
    fails("not valid JSON", copy, "--tokens", "1")


def test_newer_torch(copy):
    change(copy, lambda m: m["producer"].update(torch="99.0.0"))
    fails("compiled with torch 99.0.0", copy, "--tokens", "1")


def test_weights_cut_short(copy):
    weights = copy / "weights.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-100])
    fails(f"{len(raw) - 100} bytes, the manifest says {len(raw)}: the file was cut short", copy, "--tokens", "1")
    weights.unlink()
    fails("weights.safetensors", copy, "--tokens", "1")


def test_flipped_bytes_are_found_by_verify(copy):
    good = run(copy, "--tokens", ids(PROMPT), "--verify", "--json")
    assert good.returncode == 0, good.stderr
    manifest = json.loads((copy / "manifest.json").read_text())
    weights = copy / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    for constant in reversed(manifest["constants"]):  # each time an earlier one is damaged too
        raw[constant["offset"] + constant["bytes"] - 1] ^= 1
        weights.write_bytes(raw)
        fails(f"tensor '{constant['name']}' has SHA-256", copy, "--tokens", "1", "--verify")
    package = bytearray((copy / "model.pt2").read_bytes())
    package[len(package) // 2] ^= 1
    (copy / "model.pt2").write_bytes(package)
    fails("model.pt2: damaged", copy, "--tokens", "1", "--verify")


def test_weights_that_are_not_the_manifests(copy):
    original = (copy / "manifest.json").read_text()
    for edit, message in (
        (lambda c: c.update(name="embedding"), "tensor 'embedding' of the manifest is missing"),
        (lambda c: c.update(dtype="int32"), "'embed' has dtype F32, the manifest says I32"),
        (lambda c: c.update(shape=[WIDTH, VOCAB]), f"'embed' has shape [{VOCAB}, {WIDTH}], the manifest says [{WIDTH}, {VOCAB}]"),
        (lambda c: c.update(offset=c["offset"] + 256), "the manifest says"),
        (lambda c: c.update(shape=[VOCAB, WIDTH + 1]), "takes 2196 bytes, 'bytes' says 1952"),
    ):
        change(copy, lambda m, e=edit: e(m["constants"][0]))
        fails(message, copy, "--tokens", "1")
        (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["constants"].pop())
    fails("is not in the manifest", copy, "--tokens", "1")


def test_constants_that_are_not_the_models(copy):
    original = (copy / "manifest.json").read_text()
    change(copy, lambda m: m["kv"].pop())
    fails("uses the constant 'cache', which the manifest does not name", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"].append(m["kv"][0] | {"name": "spare"}))
    fails("names 'spare', which the compiled models do not use", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(kind="sponge"))
    fails("kv 'ring': unknown kind 'sponge'", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(layer=-1))
    fails("'layer' must be an integer >= 0", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(dtype="float16"))
    fails("wants 'ring' as BFloat16, the manifest has Half", copy, "--tokens", "1")
    (copy / "manifest.json").write_text(original)
    change(copy, lambda m: m["kv"][0].update(shape=[1 << 40, WIDTH], bytes=(1 << 40) * WIDTH * 2))
    fails("bytes) free; export with a smaller --max-seq-len", copy, "--tokens", "1")


def test_targets(copy, device):
    if device == "cuda":
        change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
        fails("the artifact has: sm_10. Export with --target sm_", copy, "--tokens", "1")
        fails("this machine has", copy, "--tokens", "1", "--device", "cuda:99")
        return
    fails("unknown device 'tpu'", copy, "--tokens", "1", "--device", "tpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_90", device="cuda", compute_capability=[9, 0]))
    fails("no CPU target; the artifact has: sm_90. Export with --target cpu", copy, "--tokens", "1", "--device", "cpu")
    change(copy, lambda m: m["targets"][0].update(target="sm_10", compute_capability=[1, 0]))
    fails("the artifact has: sm_10" if torch.cuda.is_available() else "has targets sm_10, but no usable GPU", copy, "--tokens", "1")


def test_package_cut_short(copy):
    package = copy / "model.pt2"
    package.write_bytes(package.read_bytes()[:-10])
    fails("model.pt2", copy, "--tokens", "1")
