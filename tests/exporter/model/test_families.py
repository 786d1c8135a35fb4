"""Every family against logits of other implementations: eager, exported, after every pass, compiled and played."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.weights.mixes import MIXES, block_types
from kiln.exporter.compiler.trace import lower, trace
from kiln.exporter.errors import KilnError
from kiln.exporter.model.records import DeltaNet
from kiln.exporter.source.config import from_gguf
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.synth import synth_plan, write_synthetic
from kiln.passes import edit
from tests.conftest import kiln
from tests.exporter.model import plain_forward
from tests.gguf_files import rewrite
from tests.timeline import FIXTURES, feed, fixture_logits, fixture_tokens, graph_spec, programs, weights, worst

KILN = torch.ops.kiln


@dataclass(frozen=True)
class Model:
    """A file and its logits: a fixture, or random weights of a preset with `plain_forward`. tolerance: of float32."""

    name: str
    tolerance: float = 5e-4
    preset: bool = False

    def reference(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [80] and logits [80, V]."""
        if not self.preset:
            return fixture_tokens(self.name), fixture_logits(self.name)
        tokens = torch.randint(0, 512, (80,), generator=torch.Generator().manual_seed(0))
        return tokens, plain_forward.logits(path, tokens).float()


MODELS = (
    Model("qwen3-tiny"), Model("qwen3-tiny-tied"), Model("qwen3-tiny-wide-Q4_K_M", 1e-3),  # the last against its dequantized values
    Model("gemma3-tiny", preset=True), Model("llama-tiny", preset=True),
    Model("qwen3moe-tiny"), Model("gemma4-tiny-moe"), Model("gemma4-tiny-moe-wide-Q4_K_M", 1e-3),
    Model("qwen35-tiny-mtp"), Model("qwen35moe-tiny-mtp"),
    Model("qwen35moe-tiny-wide-Q4_K_M", 1e-3),  # with heads that the kernels take
)  # fmt: skip
models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)

BY_DAY = ("qwen3-tiny", "llama-tiny", "qwen3moe-tiny")  # a form each; the others at night


def model_file(model: Model, directory: Path) -> Path:
    """Of a fixture a copy without its tokenizer: it is driven by token ids."""
    path, source = directory / f"{model.name}.gguf", FIXTURES / f"{model.name}.gguf"
    if model.preset and not path.exists():
        write_synthetic(path, model.name, "f32", 1)
    elif not path.exists():
        rewrite(path, source, drop=[key for key in open_gguf(source).metadata if key.startswith("tokenizer.")])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def check(model: Model, path: Path, start, length: int = 80) -> None:
    """One batch, chunks of 40, which are longer than every window, and of 7, token by token."""
    tokens, reference = model.reference(path)
    for chunk in dict.fromkeys((length, min(40, length), 7, 1)):
        rows = feed(*start(), tokens[:length], chunk)
        error = worst(rows, reference)
        print(f"{model.name}, chunks of {chunk}: {len(rows)} positions, max |dlogit| {error:.2e}")
        assert error <= model.tolerance, chunk


def eager(path: Path, directory: Path):
    """What makes a new plain decoder with a file's weights."""
    spec, state = graph_spec(path), weights(path, directory)

    def start():
        decoder = spec.model()
        missing = decoder.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and all(".cache." in k for k in missing.missing_keys)
        return decoder, decoder

    return start


@models
def test_eager(model: Model, files: Path) -> None:
    path = model_file(model, files)
    with torch.inference_mode():
        check(model, path, eager(path, files))


@pytest.mark.parametrize("model", [m if m.name in BY_DAY else pytest.param(m, marks=pytest.mark.nightly) for m in MODELS],
                         ids=lambda model: model.name)  # fmt: skip
def test_exported_and_after_every_pass(model: Model, files: Path) -> None:
    """As it is traced; with the passes of the CPU, the head cut in small pieces; with those of a GPU, three bytes an activation."""
    path = model_file(model, files)
    state = weights(path, files)
    cpu = graph_spec(path, materialized_head_budget=64 << 10)
    gpu = graph_spec(path, decode_bytes=3, materializes_head=False)
    with torch.no_grad():
        check(model, path, programs(cpu, state, lambda entry: trace(cpu, entry, "cpu")), 29)
        check(model, path, programs(cpu, state, lambda entry: lower(cpu, entry, "cpu").program), 29)
        check(model, path, programs(gpu, state, lambda entry: lower(gpu, entry, "cpu").program), 29)


@pytest.mark.parametrize("preset", ["qwen3-tiny", "gemma3-tiny", "llama-tiny", "qwen35-moe-tiny"])
@pytest.mark.parametrize("turboquant", [False, True])
def test_the_whole_decode_is_fused_for_a_gpu(preset: str, turboquant: bool, tmp_path: Path) -> None:
    """Nothing of the plain decoder is left, every place is rewritten, and the stream is float32 from the embedding to the head."""
    path = tmp_path / "model.gguf"
    write_synthetic(path, preset, "q4_k_m", 0)
    options = {"decode_bytes": 2, "materializes_head": False, "matmul": "kiln", "turboquant": turboquant, "residual_length": 32}
    with compiling_for(gpu_targets()["sm_90"]):
        lowered = lower(graph_spec(path, dtype="bfloat16", **options), "decode", "cuda")
    calls = [n for n in lowered.program.graph.nodes if n.op == "call_function"]
    plain = (KILN.quantized_linear, KILN.rms_norm, KILN.rope, KILN.gelu_mul, KILN.silu_mul, KILN.sliding_attention, KILN.delta_step)
    assert not [n.name for n in calls if edit.is_call(n, *(op.default for op in plain))]
    report = next(r for r in lowered.reports if r.name == "fuse_decode")
    assert report.matches == report.expected > 0 and not report.missed
    config = graph_spec(path).config
    layers, rules = len(config.layers), sum(isinstance(layer.mixer, DeltaNet) for layer in config.layers)
    assert sum(edit.is_call(n, KILN.delta_decode.default) for n in calls) == rules
    assert sum(edit.is_call(n, KILN.add_norm.default) for n in calls) == 2 * layers
    assert sum(edit.is_call(n, KILN.fixed_glu.default) for n in calls) == layers
    assert {n.meta["val"].dtype for n in calls if isinstance(n.meta["val"], torch.Tensor)}.isdisjoint({torch.bfloat16})
    if turboquant:
        full = sum(mixer.window is None for mixer in config.attentions.values())
        assert sum(edit.is_call(n, KILN.tq4_decode.default) for n in calls) == full


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(m, marks=pytest.mark.nightly) for m in MODELS[1:])], ids=lambda m: m.name)
def test_compiled_and_played(model: Model, files: Path, tmp_path: Path) -> None:
    """AOTInductor's code in the runner: a batch, then token by token."""
    runner = pytest.importorskip("kiln")
    path = model_file(model, files)
    kiln("export", "--gguf", path, "--out", tmp_path / "out", "--target", "cpu", "--max-seq-len", 96, "--prefill-chunk", 96)
    tokens, reference = model.reference(path)
    played = runner.Model(str(tmp_path / "out"), device="cpu", threads=2)
    for batch in (40, 7):
        session = runner.Session(played)
        rows = {}
        for at in range(0, 40, batch):
            session.prefill(tokens[at : min(at + batch, 40)].tolist())
            rows[min(at + batch, 40) - 1] = torch.from_numpy(np.array(session.logits()))
        for i in range(40, 80):
            session.decode(int(tokens[i]))
            rows[i] = torch.from_numpy(np.array(session.logits()))
        error = worst(rows, reference)
        print(f"{model.name}, played, batches of {batch}: {len(rows)} positions, max |dlogit| {error:.2e}")
        assert error <= model.tolerance


EDGE = Model("gemma4-tiny-edge-wide-Q4_K_M", 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [*MODELS[2:8], *MODELS[10:], EDGE], ids=lambda model: model.name)
def test_on_a_gpu(model: Model, files: Path, tmp_path: Path) -> None:
    """bfloat16 activations, fused decode: no further from the reference than 1.2 times what eager bfloat16 is. An embedding on the host
    changes no bit."""
    runner = pytest.importorskip("kiln")
    path = model_file(model, files)
    kiln("export", "--gguf", path, "--out", tmp_path / "out", "--target", "native", "--max-seq-len", 96, "--prefill-chunk", 96)
    tokens, reference = model.reference(path)
    spec, state = graph_spec(path, dtype="bfloat16"), weights(path, files)
    decoder = spec.model()
    decoder.load_state_dict(state, strict=False)
    with torch.inference_mode():
        eager = feed(decoder, decoder, tokens, 1)

    def play(ple: str) -> dict[int, torch.Tensor]:
        session, found = runner.Session(runner.Model(str(tmp_path / "out"), device="cuda", ple=ple)), {}
        session.prefill(tokens[:20].tolist())
        assert (session.memory()["host_weights"] > 0) == (ple == "host")
        for i in range(20, 80):
            session.decode(int(tokens[i]))
            found[i] = torch.from_numpy(np.array(session.logits()))
        return found

    found = play("device")
    if model is EDGE:
        assert all(torch.equal(row, found[i]) for i, row in play("host").items())
    errors = [worst({i: rows[i] for i in found}, reference) for rows in (eager, found)]
    kept = sum(int(found[i].argmax() == reference[i].argmax()) for i in found) / len(found)
    print(f"{model.name}: max |dlogit| eager {errors[0]:.2e}, on the GPU {errors[1]:.2e}; argmax kept {kept:.2f}")
    assert errors[1] <= 1.2 * errors[0]


# ---- what a file may say ----


def test_tq4_of_small_heads_is_refused(files: Path, tmp_path: Path) -> None:
    path = model_file(MODELS[0], files)
    done = kiln("export", "--gguf", path, "--out", tmp_path / "out", "--target", "cpu", "--kv-cache", "tq4", check=False)
    assert done.returncode == 1 and "head dimension 32; expected 64, 128, 256 or 512" in done.stderr and not (tmp_path / "out").exists()


F32, STRING, U32 = (GGUFValueType[name] for name in ("FLOAT32", "STRING", "UINT32"))


def yarn_keys(family: str, **values: float) -> dict:
    """Metadata of a context lengthened four times by YaRN, so that heads of 32 and 64 have pairs of all three kinds."""
    numbers = {"factor": 4.0, "yarn_beta_fast": 8.0, "yarn_beta_slow": 1.0} | values
    keys = {f"{family}.rope.scaling.{name}": (F32, value) for name, value in numbers.items()}
    return keys | {f"{family}.rope.scaling.type": (STRING, "yarn"), f"{family}.rope.scaling.original_context_length": (U32, 128)}


@pytest.mark.parametrize(
    ("model", "drop", "keys", "message"),
    [
        # a head has not the hidden size over the heads
        ("qwen3-tiny", ["qwen3.attention.key_length"], {}, "qwen3.attention.key_length is missing"),
        ("qwen3-tiny", ["qwen3.rope.freq_base"], {}, "qwen3.rope.freq_base is missing"),
        ("gemma3-tiny", [], {"gemma3.rope.scaling.type": (STRING, "yarn")}, "rope.scaling.type is 'yarn': .*only 'linear' is applied; use"),
        ("qwen3-tiny", [], {"qwen3.rope.scaling.attn_factor": (F32, 1.5)}, "attn_factor is 1.5: it is applied where .* is 'yarn' alone"),
        ("qwen3-tiny", [], yarn_keys("qwen3", factor=0.5), "scaling.factor is 0.5, but YaRN makes a context longer"),
        ("qwen3-tiny", [], yarn_keys("qwen3", yarn_beta_fast=1.0), "yarn_beta_fast is 1.0, no more than qwen3.rope.scaling.yarn_beta_slow"),
        ("qwen3-tiny", [], {"qwen3.rope.dimension_count": (U32, 16)}, "dimension_count is 16, but qwen3.attention.key_length is 32"),
        ("qwen3-tiny", [], {"qwen3.expert_count": (U32, 8)}, "mixture-of-experts layers are not supported yet"),
        ("qwen3-tiny", [], {"qwen3.attention.sliding_window": (U32, 8)}, "sliding_window is 8: it is not known to Kiln"),
        ("qwen3-tiny", [], {"qwen3.final_logit_softcapping": (F32, 30.0)}, "final_logit_softcapping is 30.0: it is not known"),
        ("llama-tiny", [], {"llama.rope.dimension_count": (U32, 32)}, "dimension_count is 32, but a head has 64 dimensions"),
        ("llama-tiny", [], {"llama.rope.scaling.type": (STRING, "longrope")}, "'longrope': .*only 'linear' and 'yarn' are applied"),
        ("llama-tiny", [], {"llama.expert_count": (U32, 8)}, "mixture-of-experts layers are not supported yet; use a dense model"),
        ("gemma3-tiny", [], {"gemma3.attn_logit_softcapping": (F32, 50.0)}, "attn_logit_softcapping is 50.0: it changes the computation"),
    ],
)
def test_what_is_not_applied_is_named(model: str, drop: list, keys: dict, message: str, files: Path, tmp_path: Path) -> None:
    source = model_file(next(m for m in MODELS if m.name == model), files)
    with pytest.raises(KilnError, match=message):
        from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", source, drop=drop, set_keys=keys)))


def test_linear_scaling_is_applied_where_it_belongs(files: Path, tmp_path: Path) -> None:
    """To every layer of a llama file, to the full layers of a gemma3 one."""
    for model, family in ((MODELS[3], "gemma3"), (MODELS[4], "llama")):
        keys = {f"{family}.rope.scaling.type": (STRING, "linear"), f"{family}.rope.scaling.factor": (F32, 8.0)}
        config = from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", model_file(model, files), set_keys=keys)))
        assert {mixer.rope.factor for mixer in config.attentions.values() if mixer.window is None} == {8.0}
        assert {mixer.rope.factor for mixer in config.attentions.values() if mixer.window is not None} <= {1.0}


def test_yarn(files: Path, tmp_path: Path) -> None:
    """Speeds of pairs and logits of a llama file against formulas; a scale of queries alone, where both sides grow, is the same."""
    source, keys = model_file(next(m for m in MODELS if m.name == "llama-tiny"), files), yarn_keys("llama")
    path = rewrite(tmp_path / "m.gguf", source, set_keys=keys)
    plan = read_plan(path)
    rope = next(iter(plan.config.ropes.values()))
    speeds = torch.tensor(plain_forward.yarn(rope.size, rope.base, 4.0, 128, 8.0, 1.0))
    torch.testing.assert_close(torch.from_numpy(plan.derived[rope.constant]), speeds, rtol=1e-6, atol=0)
    ratio = speeds * rope.base ** (torch.arange(0, rope.size, 2) / rope.size)
    assert ratio[0] == 1 and abs(ratio[-1] - 0.25) < 1e-6 and (ratio.diff() <= 1e-6).all() and 2 < len(ratio.round(decimals=4).unique())
    tokens = torch.arange(3, 60)
    expected = plain_forward.logits(path, tokens)
    assert (expected - plain_forward.logits(source, tokens)).abs().max() > 0.05
    with torch.inference_mode():
        assert worst(feed(*eager(path, tmp_path)(), tokens, 57), expected.float()) < 5e-4


def test_other_forms_of_llama_and_gemma3(files: Path, tmp_path: Path) -> None:
    """Frequencies divided by a tensor; a head size that follows from the hidden size; no window; the 27B's scale."""
    llama, gemma = model_file(MODELS[4], files), model_file(MODELS[3], files)
    divisors = {"rope_freqs.weight": ((32,), "F32", np.linspace(1, 8, 32, dtype=np.float32))}
    drop = ["llama.attention.head_count_kv"]
    config = from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", llama, drop=drop, set_tensors=divisors)))
    assert config.ropes["rope_inv_freq"].divisors == "rope_freqs.weight" and config.attentions[0].kv_heads == 6
    smaller = ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"]
    keys = {"llama.attention.head_count": (U32, 4), "llama.attention.head_count_kv": (U32, 2)}
    assert from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", llama, drop=smaller, set_keys=keys))).attentions[0].head_dim == 64
    config = from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", gemma, drop=["gemma3.attention.sliding_window"])))
    assert {mixer.window for mixer in config.attentions.values()} == {None}
    config = from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", gemma, drop=["gemma3.attention.sliding_window_pattern"])))
    assert [mixer.window for mixer in config.attentions.values()] == [16] * 5 + [None]
    keys = {"gemma3.block_count": (U32, 62), "gemma3.attention.sliding_window_pattern": (U32, 6)}
    config = from_gguf(open_gguf(rewrite(tmp_path / "m.gguf", gemma, set_keys=keys)))
    assert config.attentions[7].scale == (256 / 4) ** -0.5


@pytest.mark.parametrize("name", ["qwen3-tiny-wide-Q4_K_M", "gemma4-tiny-moe-wide-Q4_K_M"])
def test_types_of_a_mix_are_those_of_llama_quantize(name: str) -> None:
    """Of an untied head: the embedding has the types of the layers, the head more bits; experts; the router stays as it is."""
    file = open_gguf(FIXTURES / f"{name}.gguf")
    shapes = {t.name: t.shape for t in file.tensors.values()}
    assert {t.name: t.type for t in file.tensors.values()} == block_types(MIXES["q4_k_m"], shapes)


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"),
    [("qwen3-8b", 399, 8_190_735_360), ("qwen3-32b", 707, 32_762_123_264), ("qwen3-30b-a3b", 579, 30_532_122_624),
     ("gemma4-26b-a4b", 658, 25_233_141_790 + 256), ("qwen35-27b", 851, 26_895_998_464), ("qwen35-35b-a3b", 733, 34_660_610_688)],
)  # fmt: skip
def test_real_geometry(preset: str, tensors: int, parameters: int) -> None:
    plan = synth_plan(preset, "q4_k_m")
    assert (len(plan), sum(prod(shape) for _, shape, _ in plan)) == (tensors, parameters)
