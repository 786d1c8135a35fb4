"""A layer's matmuls between two attentions as one op: on the CPU the ops that it stands for, bit for bit; a stub and its CUDA C++."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from kiln.custom_ops.chain import chain
from kiln.custom_ops.chain.cut import cut_for, flag_words
from kiln.custom_ops.gpu import contract, cubin
from kiln.custom_ops.gpu.early import waiting_kernels
from kiln.custom_ops.gpu.target import GpuTarget, compiling_for, gpu_targets
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.gpu.test_kernel_resources import compile_case
from tests.custom_ops.weights.test_linear import random_weight, random_x

kiln = torch.ops.kiln
TARGETS = gpu_targets()
EPS = 1e-6
D, A, F, QK, V = 256, 512, 768, 384, 128  # stream, attention's output, inner, projections
SHAPES = ((D, A), (2 * F, D), (D, F), (QK, D), (V, D))
FORMS = {"gemma": ("Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K"), "qwen": ("Q4_K", "Q6_K", "Q4_K", "Q4_K")}


def inputs(form: str, tokens: int) -> dict:
    """The op's arguments; "gemma" has post norms and a scale, "qwen" none."""
    types = FORMS[form]
    weights = [random_weight(t, n, k, seed=i)[:2] for i, (t, (n, k)) in enumerate(zip(types, SHAPES, strict=False))]
    g = torch.Generator().manual_seed(3)
    norms = {name: torch.rand(D, generator=g) + 0.5 for name in ("weight0", "weight1", "post0", "post1")}
    normed = form == "gemma"
    return {
        "x": fixed_point.quantize(random_x(tokens, A, torch.float32), 2), "stream": random_x(tokens, D, torch.float32, 5) * 3,
        "words": [w for w, _ in weights], "halves": [h for _, h in weights], "block_types": ",".join(types),
        "flags": torch.zeros(flag_words(), dtype=torch.int32), "post0": norms["post0"] if normed else None, "scale0": None,
        "weight0": norms["weight0"], "post1": norms["post1"] if normed else None, "scale1": torch.tensor([0.4]) if normed else None,
        "weight1": norms["weight1"], "eps": EPS, "activation": "gelu_tanh" if normed else "silu",
    }  # fmt: skip


def by_ops(x, stream, words, halves, block_types, flags, post0, scale0, weight0, post1, scale1, weight1, eps, activation) -> list:
    """The sequence in a fused graph."""
    counters = torch.zeros(64, dtype=torch.int32)
    weights = list(zip(words, halves, block_types.split(","), strict=True))

    def added(to, x, weight, post, scale, norm):
        if post is None:
            return kiln.add_norm(to, kiln.fixed_linear(x, *weight, counters), None, None, scale, norm, eps, 2)
        y, squares = kiln.fixed_linear_squares(x, *weight, counters)
        return kiln.add_norm(to, y, squares, post, scale, norm, eps, 2)

    between, normed, squares = added(stream, x, weights[0], post0, scale0, weight0)
    inner = kiln.fixed_glu(normed, *weights[1], counters, squares, eps, activation)
    after, normed, squares = added(between, inner, weights[2], post1, scale1, weight1)
    return [after, *(kiln.fixed_partials(normed, *weight, squares, eps) for weight in weights[3:])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_it_is_the_ops_that_it_stands_for(form: str, tokens: int) -> None:
    given = inputs(form, tokens)
    found, expected = kiln.matmul_chain(**given), by_ops(**given)
    assert len(found) == len(expected) == len(FORMS[form]) - 2
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert found[0].shape == (tokens, D) and found[1].shape == ((1, QK) if tokens == 1 else (1, tokens, QK))
    for i in range(tokens if tokens > 1 else 0):  # no token's bits depend on the others
        alone = kiln.matmul_chain(**given | {"x": given["x"][i : i + 1], "stream": given["stream"][i : i + 1]})
        assert torch.equal(alone[0][0], found[0][i]) and all(torch.equal(a, b[:, i]) for a, b in zip(alone[1:], found[1:], strict=True))


def test_against_float64() -> None:
    """The definition, with the rounding of activations alone: two bytes lose 4e-5 of a matmul, 6e-5 behind a gate."""
    given = inputs("gemma", 2)
    x = fixed_point.dequantize(given["x"]).double()
    w = [torch.from_numpy(random_weight(t, n, k, seed=i)[2]).double()
         for i, (t, (n, k)) in enumerate(zip(FORMS["gemma"], SHAPES, strict=True))]  # fmt: skip

    def rms(t: torch.Tensor) -> torch.Tensor:
        return t / (t.square().mean(-1, keepdim=True) + EPS).sqrt()

    between = given["stream"].double() + rms(x @ w[0].T) * given["post0"]
    gate, value = (rms(between) * given["weight0"] @ w[1].T).chunk(2, -1)
    inner = torch.nn.functional.gelu(gate, approximate="tanh") * value
    after = (between + rms(inner @ w[2].T) * given["post1"]) * given["scale1"].double()
    exact = [after, *(rms(after) * given["weight1"] @ m.T for m in w[3:])]
    for found, expected in zip(kiln.matmul_chain(**given), exact, strict=True):
        found = found.sum(0) if found.dim() == 3 else found
        assert float((found - expected).norm() / expected.norm()) < 3e-4  # four roundings


def test_wrong_arguments_are_named() -> None:
    given = inputs("gemma", 1)
    short = {name: given[name][:3] for name in ("words", "halves")} | {"block_types": "Q4_K,Q4_K,Q6_K"}
    wide = torch.cat((given["words"][3], given["words"][3]), 2)[:, :, : QK], torch.cat((given["halves"][3],) * 2, 2)[:, :, :QK]
    for wrong, message in (
        (short, "3 words, 3 halves, types Q4_K, Q4_K, Q6_K; expected 4 or 5 of each, of Q4_K or Q6_K"),
        ({"block_types": "Q4_K,Q4_K,Q6_K,Q5_K,Q6_K"}, "types Q4_K, Q4_K, Q6_K, Q5_K, Q6_K; expected"),
        ({"block_types": "Q4_K,Q4_K,Q4_K,Q4_K,Q6_K"}, r"Q4_K words \(3, 52, 256\)"),
        ({"words": [given["words"][0], given["words"][0], *given["words"][2:]],
          "halves": [given["halves"][0], given["halves"][0], *given["halves"][2:]]},
         r"matrices \[256, 512\], \[256, 512\], .* expected \[D, A\], \[2 F, D\]"),
        ({"words": [*given["words"][:3], wide[0], given["words"][4]], "halves": [*given["halves"][:3], wide[1], given["halves"][4]]},
         r"strides .*; expected contiguous planes"),
        ({"x": fixed_point.quantize(random_x(1, D, torch.float32), 2)}, r"x is torch.int32 \(1, 1, 176\)"),
        ({"x": fixed_point.quantize(random_x(1, A, torch.float32), 3)}, r"x has the form \(3, 256\); expected 2 bytes and extents of 256"),
        ({"x": fixed_point.quantize(random_x(1, A, torch.float32), 2, 64)}, r"x has the form \(2, 32\)"),
        ({"stream": given["stream"].bfloat16()}, r"stream is torch.bfloat16 \(1, 256\)"),
        ({"stream": random_x(2, D, torch.float32)}, r"stream is torch.float32 \(2, 256\), x has 1 tokens"),
        ({"post1": None}, r"post1 None, scale1 \(1,\), weight1 \(256,\); expected .* both post norms or none"),
        ({"weight1": torch.ones(D + 32)}, r"weight1 \(288,\)"),
        ({"scale1": torch.ones(2)}, r"scale1 \(2,\)"),
        ({"activation": "relu"}, "activation 'relu'; expected gelu_tanh or silu"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kiln.matmul_chain(**given | wrong)
    many = inputs("qwen", 9)
    with pytest.raises(ValueError, match="of 1 to 8"):
        kiln.matmul_chain(**many)


class Layer(torch.nn.Module):
    def __init__(self, form: str, flags: int = flag_words()) -> None:
        super().__init__()
        given = inputs(form, 1) | {"flags": torch.zeros(flags, dtype=torch.int32)}
        self.form, self.types = given["activation"], given["block_types"]
        self.norms = [name for name in ("post0", "scale0", "weight0", "post1", "scale1", "weight1") if given[name] is not None]
        for name in (*self.norms, "flags"):
            self.register_buffer(name, given[name])
        for i, (w, h) in enumerate(zip(given["words"], given["halves"], strict=True)):
            self.register_buffer(f"words_{i}", w)
            self.register_buffer(f"halves_{i}", h)

    def forward(self, x: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        words, halves = ([getattr(self, f"{name}_{i}") for i in range(len(self.types.split(",")))] for name in ("words", "halves"))
        norms = [getattr(self, n, None) for n in ("post0", "scale0", "weight0", "post1", "scale1", "weight1")]
        return tuple(kiln.matmul_chain(x, stream, words, halves, self.types, self.flags, *norms, EPS, self.form))


def test_opaque_when_exported() -> None:
    given = inputs("gemma", 2)
    program = torch.export.export(Layer("gemma"), (given["x"], given["stream"]), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("kiln.matmul_chain.default") == 1 and not any("mm" in t or "bitwise" in t for t in targets)
    for a, b in zip(program.module()(given["x"], given["stream"]), kiln.matmul_chain(**given), strict=True):
        assert torch.equal(a, b)


# ---- the kernel, without a GPU ----


def case(target: GpuTarget, tokens: int = 1):
    return next(c for c in chain.kernel_cases(target) if c.name.endswith(f", {tokens} tokens"))


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_120"])
def test_it_compiles(name: str) -> None:
    """With all that the source asserts of the cut; grid, threads and shared memory are the launch's."""
    target = TARGETS[name]
    compiled = compile_case(case(target), target)
    image = compiled.asm["cubin"]
    assert cubin.kernels(image) == ["kiln_chain"]
    assert [p.end - p.begin for p in cubin.parameters(image, "kiln_chain")] == [8] * 27
    text = case(target).constexprs["SOURCE"]
    threads, shared = map(int, text.split()[3:5])
    assert (compiled.metadata.num_warps * 32, compiled.metadata.shared) == (threads, shared)
    code = {i.base for i in cubin.instructions(cubin.disassembled(image))}
    assert ("ACQBULK" in code) == (target.sm >= 90)
    assert "LDGSTS" in code


def test_early_launch() -> None:
    declared = waiting_kernels()["kiln_chain"]
    assert declared.arguments[-5:] == ("parts", "rows", "flags", "out", "out_more") and not declared.idle
    assert set(declared.reads) == {f"{plane}{i}" for plane in ("words", "halves") for i in range(5)}
    for tokens in (1, 8):
        assert contract.check(compile_case(case(TARGETS["sm_90"], tokens), TARGETS["sm_90"]).asm["cubin"]) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_launch(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are as many and as large as the source says, in its order; what is not there is something that is."""
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, SOURCE: launched.update(grid=grid, given=given, source=SOURCE)

    monkeypatch.setattr(chain, "kernel", lambda fn: Kernel())
    given = inputs(form, 4)
    types, activation, eps = given.pop("block_types").split(","), given.pop("activation"), given.pop("eps")
    given["flags"] = torch.zeros(flag_words(), dtype=torch.int32)
    with compiling_for(TARGETS["sm_90"]):
        after, parts = chain._launch(**given, types=types, eps=eps, activation=activation)
        cut = cut_for(chain.matrices_of(given["words"], types), 4, TARGETS["sm_90"])
        with pytest.raises(ValueError, match=r"100 flags; \d matmuls take"):
            chain._launch(**given | {"flags": torch.zeros(100)}, types=types, eps=eps, activation=activation)
    named = dict(zip(chain.kiln_chain.arg_names, launched["given"], strict=False))
    assert list(named) == chain.kiln_chain.arg_names[:-1] and launched["grid"] == (132,)
    assert named["stream_out"] is after and named["stream_in"] is given["stream"]
    assert all(a is b for a, b in zip(parts, (named["out"], named["out_more"]), strict=False))
    assert [p.shape for p in parts] == [(cut.parts(m), 4, m.n) for m in cut.matmuls[3:]]
    assert named["parts"].numel() == cut.parts_floats and named["rows"].numel() == cut.rows_words
    assert named["halves1"] is given["halves"][1] and named["words4"] is (given["words"][4] if form == "gemma" else given["words"][0])
    assert named["scale0"] is given["weight0"] and (named["post0"] is given["weight0"]) == (form == "qwen")
    written = [named[name] for name in ("between", "stream_out", "parts", "rows", "flags", "out", "out_more")]
    assert len({t.data_ptr() for t in written}) == len(written)
    said = dict(re.findall(r"(\w+)=(\S+?);?(?= |$)", launched["source"]))
    expected = {"POST": "1", "SILU": "0", "SCALE1": "1"} if form == "gemma" else {"POST": "0", "SILU": "1", "SCALE1": "0"}
    assert said.items() >= (expected | {"SCALE0": "0", "EARLY": "1", "WIDTH": str(D), "EPS": "1e-06f", "M": "4"}).items()


def package(directory: str) -> tuple[str, list[str], bytes]:
    """In a process of its own: the generated host code, the names of kernels, and the library."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{directory}/inductor", f"{directory}/triton"
    import torch._inductor

    from kiln.exporter.compiler import torch_private

    target = TARGETS["sm_90"]
    with torch_private.quiet(), compiling_for(target):
        torch_private.install(target)
        shapes = lambda: (torch.empty(2, A // 256, 176, dtype=torch.int32), torch.empty(2, D))  # noqa: E731
        program = torch_private.fake_export(lambda: Layer("gemma", flag_words()), shapes, None, "cuda")
        files = torch._inductor.aot_compile(program.module(check_guards=False), *program.example_inputs,
                                            options=torch_private.inductor_options(target, "decode"))  # fmt: skip
    read = {Path(f).suffix: Path(f).read_bytes() for f in files if f.endswith((".so", "wrapper.cpp"))}
    return read[".cpp"].decode(), torch_private.KERNELS, read[".so"]


def test_a_package(tmp_path: Path) -> None:
    """The kernel alone, launched for every multiprocessor: what it writes is copied nowhere, and what it does not write is not either."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wrapper, names, library = pool.submit(package, str(tmp_path)).result()
    assert names == ["kiln_chain_0"]
    (image,) = cubin.images(library)
    assert cubin.kernels(image) == ["kiln_chain"] and contract.check(image) == []
    (call,) = re.findall(r"^ *call_kiln_chain_0\((.*)\);", wrapper, re.MULTILINE)
    assert ", 132L, 1L, 1L, " in call or ", 132, 1, 1, " in call, call
