"""Kernels of CUDA C++: their code in place of a stub's, in every architecture, cache and package."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import PTXASError

from kiln.custom_ops.cases import KernelCase
from kiln.custom_ops.gpu import contract, cubin, cuda_source
from kiln.custom_ops.gpu.cuda_source import CudaSourceError, made_from
from kiln.custom_ops.gpu.early import Waiting
from kiln.custom_ops.gpu.launch import kernel
from kiln.custom_ops.gpu.op import kernel_op
from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from tests.custom_ops.gpu.test_kernel_resources import compile_case, examine
from tests.tools.cubins import architecture

MAD = Path(__file__).with_name("mad.cu")
MARKER = "0x5eed1234"
THREADS = 64


@triton.jit(do_not_specialize=["n"])
def kiln_mad(x, out, n, SOURCE: tl.constexpr):
    made_from(SOURCE)
    tl.store(out, 0)


def source(path: Path = MAD, threads: int = THREADS, factor: float = 0.1) -> str:
    return cuda_source.cuda_source(path, threads=threads, shared=4 * threads, FACTOR=factor)


def reference(x: torch.Tensor) -> torch.Tensor:
    return 0.1 * x.view(-1, 2).flip(1).flatten() + torch.arange(x.shape[0], device=x.device)


@kernel_op("kiln_tests::mad", mutates_args=())
def mad(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return reference(x)
    out = torch.empty_like(x)
    kernel(kiln_mad)[(triton.cdiv(x.shape[0], THREADS),)](x, out, x.shape[0], SOURCE=source())
    return out


def case(text: str, **signature: str) -> KernelCase:
    return KernelCase("mad", kiln_mad, {"x": "*fp32", "out": "*fp32", "n": "i32"} | signature, {"SOURCE": text})


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the source, to be changed; with a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("mad.cu", "mad.cuh"):
        shutil.copy(MAD.with_name(name), tmp_path / name)
    return tmp_path / "mad.cu"


def change(path: Path, old: str, new: str) -> None:
    """As a new process finds it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    cuda_source._described.cache_clear()


@pytest.mark.parametrize("name", gpu_targets())
def test_code_of_the_source(name: str) -> None:
    target = gpu_targets()[name]
    compiled = compile_case(case(source()), target)
    image = compiled.asm["cubin"]
    assert cubin.kernels(image) == ["kiln_mad"] == [compiled.metadata.name]
    assert architecture(image) == name
    assert (compiled.metadata.num_warps, compiled.metadata.shared) == (THREADS // 32, 4 * THREADS)
    assert [p.end - p.begin for p in cubin.parameters(image, "kiln_mad")] == [8, 8, 4, 8, 8]
    code = cubin.instructions(cubin.disassembled(image))
    assert any(MARKER in operand for i in code for operand in i.operands) and any(i.base == "LDS" for i in code)
    line, problems = examine(case(source()), target)
    assert "256 bytes of shared memory" in line and all("nothing to do" in problem for problem in problems)  # it is a small one


def test_a_spill_is_named(copy: Path) -> None:
    change(copy, "  if (i < n)", "  volatile float kept[64];\n  kept[i & 63] = 1.0f;\n  if (i < n && kept[n & 63] > 0)")
    assert any("spills" in problem for problem in examine(case(source(copy)), gpu_targets()["sm_90"])[1])


def test_a_change_compiles_anew(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the text, an include, a definition or NVRTC: none is served what another left in the cache."""
    target = gpu_targets()["sm_90"]
    codes = [compile_case(case(source(copy)), target).asm["cubin"]]
    with monkeypatch.context() as patch:
        patch.setattr(cuda_source, "_compiled", lambda *_: pytest.fail("nothing has changed"))
        assert compile_case(case(source(copy)), target).asm["cubin"] == codes[0]
    change(copy, "+ i;", "+ i * 7;")
    codes.append(compile_case(case(source(copy)), target).asm["cubin"])
    change(copy.with_suffix(".cuh"), "i ^ 1", "i ^ 3")
    codes.append(compile_case(case(source(copy)), target).asm["cubin"])
    codes.append(compile_case(case(source(copy, factor=0.2)), target).asm["cubin"])
    assert len(set(codes)) == 4
    before = source(copy)
    monkeypatch.setattr(cuda_source, "nvrtc_version", lambda: (13, 7))
    cuda_source._described.cache_clear()
    assert source(copy) != before


def test_a_change_under_a_running_process_is_an_error(copy: Path) -> None:
    text = source(copy)
    change(copy, "+ i;", "+ i * 9;")
    with pytest.raises(CudaSourceError, match="has changed since this process read it"):
        compile_case(case(text), gpu_targets()["sm_90"])


WRONG = (
    ("+ i;", "+ nothing;", r'mad\.cu\(10\): error: identifier "nothing" is undefined'),
    ("int n,", "long long n,", r"have \[8, 8, 8, 8, 8\] bytes, its stub's \[8, 8, 4, 8, 8\]"),
    (", SCRATCH", "", r"have \[8, 8, 4\] bytes"),
    (" KERNEL(", " mad(", "kernels are mad; expected one"),
    ("extern __shared__ __align__(16) float tile[]", "__shared__ float tile[THREADS]", "shared memory of a fixed size"),
    ("const float* x", "float* x", r"stores nothing through float\* x, which is not const"),
    ("int n, SCRATCH", "int n, const void*, const void*", r"expected KERNEL\(..., SCRATCH\)"),
    ('"mad.cuh"', '"other.cuh"', "other.cuh cannot be read: No such file"),
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_what_is_wrong_is_named(copy: Path, target: str) -> None:
    right = copy.read_text()
    for old, new, message in WRONG:
        copy.write_text(right)
        change(copy, old, new)
        with pytest.raises(CudaSourceError, match=message):
            compile_case(case(source(copy)), gpu_targets()[target])


def test_an_integer_that_is_1_is_no_parameter() -> None:
    one = KernelCase("mad", kiln_mad, {"x": "*fp32", "out": "*fp32"}, {"n": 1, "SOURCE": source()})
    with pytest.raises(CudaSourceError, match=r"its stub's \[8, 8, 8, 8\]; .* an integer that is 1 in a graph is no parameter"):
        compile_case(one, gpu_targets()["sm_90"])


@pytest.mark.parametrize("given", [{"threads": 100}, {"threads": 2048}, {"shared": -1}, {"N": "7"}, {"THREADS": 32}, {"F": float("nan")}])
def test_arguments(given: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(given))}=.* cannot be given"):
        cuda_source.cuda_source(MAD, **({"threads": 64} | given))


def test_registers_are_the_sources() -> None:
    limited = KernelCase("mad", kiln_mad, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"SOURCE": source()}, {"maxnreg": 64})
    with pytest.raises(CudaSourceError, match="in the source, not by its launch"):
        compile_case(limited, gpu_targets()["sm_90"])


def test_a_stub_alone_does_not_compile(copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None)
    with pytest.raises(PTXASError, match="PTX codegen error"):
        compile_case(case(source(copy)), gpu_targets()["sm_90"])
    capfd.readouterr()


EARLY = """
extern "C" __global__ void KERNEL(const float* weight, const float* x, float* out, int n, SCRATCH) {
  int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) i = 0;
  float w = BEFORE[i];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  out[i] = w * weight[i] + x[i];
}
"""


BULK = """
extern "C" __global__ void KERNEL(const float* weight, const float* x, float* out, int n, SCRATCH) {
  extern __shared__ __align__(128) float tile[];
  unsigned to, barrier;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(to) : "l"(tile));
  barrier = to + 1024;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;" ::"r"(barrier) : "memory");
    COPY
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  out[threadIdx.x] = tile[threadIdx.x] * x[threadIdx.x];
}
"""
IN = 'asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];" '
OUT = 'asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%1], [%0], 512; // %2" '


@triton.jit
def kiln_early(weight, x, out, n, SOURCE: tl.constexpr):
    made_from(SOURCE)
    tl.store(out, 0)


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_early_launch(tmp_path: Path, target: str) -> None:
    """A source keeps the contract or is found to break it, as a kernel of Triton's."""
    waiting = Waiting(("weight", "x", "out", "n"), ("weight",), False)
    found = {}
    for before in ("weight", "x"):
        path = tmp_path / f"{before}.cu"
        path.write_text(EARLY.replace("BEFORE", before))
        signature = dict.fromkeys(("weight", "x", "out"), "*fp32") | {"n": "i32"}
        early = KernelCase("early", kiln_early, signature, {"SOURCE": cuda_source.cuda_source(path, threads=128)})
        image = compile_case(early, gpu_targets()[target]).asm["cubin"]
        found[before] = contract.problems(image, "kiln_early", waiting)
    assert found["weight"] == []
    assert len(found["x"]) == 1 and "a load from x" in found["x"][0]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_early_launch_of_copies_in_bulk(tmp_path: Path, target: str) -> None:
    """From global to shared memory they are loads, and followed as such; the other way they are not."""
    waiting, found = Waiting(("weight", "x", "out", "n"), ("weight",), False), []
    signature = dict.fromkeys(("weight", "x", "out"), "*fp32") | {"n": "i32"}
    for i, (copy_, pointer) in enumerate(((IN, "weight"), (IN, "x"), (OUT, "weight"))):
        path = tmp_path / f"{i}.cu"
        path.write_text(BULK.replace("COPY", f'{copy_} ::"r"(to), "l"({pointer} + blockIdx.x * 128), "r"(barrier) : "memory");'))
        text = cuda_source.cuda_source(path, threads=128, shared=2048)
        image = compile_case(KernelCase("bulk", kiln_early, signature, {"SOURCE": text}), gpu_targets()[target]).asm["cubin"]
        found.append(contract.problems(image, "kiln_early", waiting))
    assert found[0] == [] and [len(problems) for problems in found[1:]] == [1, 1]
    assert "a load from x" in found[1][0] and "which is no load" in found[2][0]


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.kiln_tests.mad(torch.tanh(torch.ops.kiln_tests.mad(x)))


def package(directory: str) -> tuple[str, list[str], bytes, tuple[int, int, bytes]]:
    """In a process of its own: the generated host code, the kernels' names, the library, and what a launch of torch's would load."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{directory}/inductor", f"{directory}/triton"
    import torch._inductor

    from kiln.exporter.compiler import torch_private

    gpu = gpu_targets()["sm_90"]
    with torch_private.quiet(), compiling_for(gpu):
        torch_private.install(gpu)
        program = torch_private.fake_export(Twice, lambda: (torch.empty(1000),), None, "cuda")
        module = program.module(check_guards=False)
        files = torch._inductor.aot_compile(module, *program.example_inputs, options=torch_private.inductor_options(gpu, "decode"))
    read = {Path(f).suffix: Path(f).read_bytes() for f in files if f.endswith((".so", "wrapper.cpp"))}
    direct = kiln_mad.warmup(torch.float32, torch.float32, 1, SOURCE=source(), grid=(1,))
    direct = direct.metadata.num_warps, direct.metadata.shared, direct.asm["cubin"]
    return read[".cpp"].decode(), torch_private.KERNELS, read[".so"], direct


def test_a_package(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wrapper, names, library, direct = pool.submit(package, str(tmp_path)).result()
    assert names[0] == "kiln_mad_0"
    (image,) = (image for image in cubin.images(library) if cubin.kernels(image) == ["kiln_mad"])
    assert architecture(image) == "sm_90" and MARKER in cubin.disassembled(image)
    assert direct == (THREADS // 32, 4 * THREADS, image)
    assert cuda_source.MARK.encode() not in library and b"site-packages" not in library
    assert f'loadKernel(__kiln_mad_0_start, "kiln_mad", {4 * THREADS})' in wrapper
    (launch,) = re.findall(r"launchKernel\(kernels_\.kiln_mad_0, grid_0, grid_1, grid_2, (\d+), (\d+),", wrapper)
    assert launch == (str(THREADS // 32), str(4 * THREADS))
    assert len(re.findall(r"^ *call_kiln_mad_0\(.*, 1000, 16L, 1L, 1L,", wrapper, re.MULTILINE)) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", [2, 64, 1000])
def test_on_a_gpu(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.ops.kiln_tests.mad(x.cuda()).cpu(), reference(x), rtol=1e-6, atol=1e-6)  # a rounding of float32
