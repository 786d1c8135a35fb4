"""The runner's own CPU operators beside torch's, over every kind of strides, thread count and instruction set."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from kiln.custom_ops.weights.layouts import LAYOUTS, dequantize, pack
from tests.custom_ops.weights.test_layouts import random_blocks

pytestmark = pytest.mark.builds

SRC = Path(__file__).parents[3] / "runtime_cpp" / "src"
BINDINGS = r"""
#include "cpu/ops.h"
#include "cpu/packed.h"
using namespace kiln;
extern "C" {
void threads(int n) { set_cpu_threads(n); }
int kernels(const char* name) { return set_matmul_kernels(name); }
void mm(float* c, const int64_t* cs, const float* a, const int64_t* as, const float* b, const int64_t* bs, const int64_t* bmkn) {
  batch_matmul(c, cs[1], cs[0], {a, as[1], as[2]}, as[0], {b, bs[1], bs[2]}, bs[0], bmkn[0], bmkn[1], bmkn[2], bmkn[3]);
}
int packed_mm(float* c, int64_t c_row, const float* a, const int64_t* as, const char* type, const int32_t* w, const int64_t* ws,
              const uint16_t* h, const int64_t* hs, const int64_t* mkn) {
  PackedMatrix b{block_type(type), w, h, ws[0], ws[1], hs[0], hs[1]};
  if (!b.type) return 1;
  packed_matmul(c, c_row, {a, as[0], as[1]}, b, mkn[0], mkn[1], mkn[2]);
  return 0;
}
void unpacked(float* to, const char* type, const int32_t* w, const int64_t* ws, const uint16_t* h, const int64_t* hs,
              const int64_t* kn) {
  PackedMatrix b{block_type(type), w, h, ws[0], ws[1], hs[0], hs[1]};
  const int64_t n = kn[1];
  for (int64_t c = 0; c < n; c += 100) unpack(b, 0, kn[0], c, static_cast<int>(n - c < 100 ? n - c : 100), to + c, n);
}
void sort(float* v, const int64_t* vs, int64_t* i, const int64_t* is, const float* x, const int64_t* xs, int64_t rows, int64_t n,
          int descending) {
  stable_sort({v, vs[0], vs[1]}, {i, is[0], is[1]}, {x, xs[0], xs[1]}, rows, n, descending);
}
void cumsum_f32(float* o, const int64_t* os, const float* x, const int64_t* xs, int64_t rows, int64_t n) {
  cumsum(Rows<float>{o, os[0], os[1]}, Rows<const float>{x, xs[0], xs[1]}, rows, n);
}
void cumsum_i64(int64_t* o, const int64_t* os, const int64_t* x, const int64_t* xs, int64_t rows, int64_t n) {
  cumsum(Rows<int64_t>{o, os[0], os[1]}, Rows<const int64_t>{x, xs[0], xs[1]}, rows, n);
}
}
"""


class Ops:
    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))

    @staticmethod
    def _at(t: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.Array]:
        return ctypes.c_void_p(t.data_ptr()), (ctypes.c_int64 * t.dim())(*t.stride())

    def matmul(self, a: torch.Tensor, b: torch.Tensor, pad: int = 0) -> torch.Tensor:
        """[B, m, n] of a [B, m, k] and b [B, k, n], rows `pad` further apart than they need be."""
        (batch, m, k), n = a.shape, b.shape[2]
        out = torch.full((batch, m, n + pad), 7.0)
        self.lib.mm(*self._at(out), *self._at(a), *self._at(b), (ctypes.c_int64 * 4)(batch, m, k, n))
        assert (out[..., n:] == 7).all()  # what lies between the rows
        return out[..., :n]

    def packed_matmul(self, a: torch.Tensor, block_type: str, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        """[m, n] of a [m, k] and packed weights [k, n]."""
        (m, k), n = a.shape, words.shape[2]
        out = torch.full((m, n), 7.0)
        sizes = (ctypes.c_int64 * 3)(m, k, n)
        assert not self.lib.packed_mm(
            self._at(out)[0], ctypes.c_int64(n), *self._at(a), block_type.encode(), *self._at(words), *self._at(halves), sizes
        )
        return out

    def unpacked(self, block_type: str, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        k, n = words.shape[0] * LAYOUTS[block_type].block, words.shape[2]
        out = torch.full((k, n), 7.0)
        self.lib.unpacked(self._at(out)[0], block_type.encode(), *self._at(words), *self._at(halves), (ctypes.c_int64 * 2)(k, n))
        return out

    def sort(self, x: torch.Tensor, descending: bool) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.empty(x.shape), torch.empty(x.shape, dtype=torch.int64)
        sizes = (ctypes.c_int64(n) for n in x.shape)
        self.lib.sort(*self._at(values), *self._at(indices), *self._at(x), *sizes, int(descending))
        return values, indices

    def cumsum(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        call = self.lib.cumsum_f32 if x.dtype == torch.float32 else self.lib.cumsum_i64
        call(*self._at(out), *self._at(x), *(ctypes.c_int64(n) for n in x.shape))
        return out


@pytest.fixture(scope="module")
def ops(tmp_path_factory) -> Ops:
    folder = tmp_path_factory.mktemp("cpu_ops")
    (folder / "bindings.cpp").write_text(BINDINGS)
    sources = [folder / "bindings.cpp", SRC / "cpu/ops.cpp", SRC / "cpu/matmul.cpp", SRC / "cpu/packed.cpp"]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"]
    command = ["c++", *flags, f"-I{SRC}", *sources, "-o", folder / "ops.so"]
    subprocess.run(command, check=True)
    return Ops(folder / "ops.so")


@pytest.fixture(params=["avx512", "avx2"])
def kernels(ops: Ops, request) -> str:
    if not ops.lib.kernels(request.param.encode()):
        assert request.param == "avx512", "every x86-64-v3 CPU has AVX2"
        pytest.skip("this CPU has no AVX-512")
    return request.param


SHAPES = [(1, 1, 1), (1, 700, 300), (2, 64, 513), (3, 5, 64), (4, 515, 129), (5, 33, 17), (6, 16, 16), (14, 512, 32), (15, 513, 33),
          (29, 1025, 600), (96, 48, 320), (300, 64, 7)]


def operand(batch: int, rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    """Normal numbers [batch, rows, columns] with the strides of `kind`."""
    g = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return torch.randn(batch, rows, columns, generator=g)
    if kind == "transposed":
        return torch.randn(batch, columns, rows, generator=g).transpose(1, 2)
    if kind == "heads":  # [rows, batch, columns], as queries lie
        return torch.randn(rows, batch, columns, generator=g).transpose(0, 1)
    if kind == "expanded":
        return torch.randn(1, rows, 1, generator=g).expand(batch, rows, columns)
    return torch.randn(batch, 2 * rows, 3 * columns, generator=g)[:, ::2, 1::3]  # "sparse"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch, kinds", [
    (1, ("dense", "dense")), (1, ("dense", "transposed")), (1, ("transposed", "sparse")), (4, ("heads", "transposed")),
    (2, ("sparse", "expanded")), (3, ("expanded", "heads")),
])
def test_matmul(ops, kernels, batch, kinds, threads):
    ops.lib.threads(threads)
    for i, (m, k, n) in enumerate(SHAPES):
        a, b = operand(batch, m, k, kinds[0], i), operand(batch, k, n, kinds[1], 100 + i)
        exact = a.double() @ b.double()
        bound = (a.double().abs() @ b.double().abs()) * 2.0**-24 * (min(k, 512) + -(-k // 512) + 1)  # of a chain of rounded sums
        got = ops.matmul(a, b, pad=i % 3)
        assert ((got - exact).abs() <= bound).all(), (m, k, n, (got - exact).abs().max())


def test_a_row_has_the_same_bits_alone_and_beside_others(ops):
    """Whatever the rows beside it, the threads, the instruction set and the strides: chunks of a prompt agree."""
    a, b = operand(1, 70, 1300, "dense", 1), operand(1, 1300, 610, "dense", 2)
    ops.lib.kernels(b"avx2"), ops.lib.threads(1)
    whole = ops.matmul(a, b)
    column_major = b.transpose(1, 2).contiguous().transpose(1, 2)
    for name in (b"avx2", b"avx512"):
        if not ops.lib.kernels(name):
            continue
        for threads in (1, 2, 5):
            ops.lib.threads(threads)
            for first, rows in ((0, 70), (0, 1), (3, 2), (10, 3), (7, 4), (30, 13), (30, 40)):
                for right in (b, column_major):
                    part = slice(first, first + rows)
                    assert torch.equal(ops.matmul(a[:, part], right), whole[:, part]), (name, threads, part)


def packed(block_type: str, n: int, g: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes of n + 3 columns, cut to n: rows are further apart than they need be."""
    words, halves = (torch.from_numpy(plane) for plane in pack(block_type, random_blocks(block_type, n + 3, g)))
    return words[:, :, 2 : 2 + n], halves[:, :, 2 : 2 + n]


@pytest.mark.parametrize("block_type", LAYOUTS)
def test_packed_weights(ops, kernels, block_type):
    """Unpacked bit for bit as the layout says; a product's bits are those of the product with what was unpacked."""
    for n, g in ((1, 1), (7, 3), (261, 1), (300, 1100 // LAYOUTS[block_type].block)):
        words, halves = packed(block_type, n, g)
        dense = dequantize(block_type, words, halves)
        assert torch.equal(ops.unpacked(block_type, words, halves).view(torch.int32), dense.view(torch.int32))
        for threads in (1, 3):
            ops.lib.threads(threads)
            for m in (1, 2, 3, 4, 5, 14, 31):
                a = operand(1, m, len(dense), "transposed" if m % 2 else "dense", m)
                got, same = ops.packed_matmul(a[0], block_type, words, halves), ops.matmul(a, dense[None])[0]
                assert torch.allclose(got, same, 0, 0, equal_nan=True), (n, g, m)  # exponents of MXFP4 reach infinity


def test_matmul_of_nothing(ops):
    assert torch.equal(ops.matmul(torch.ones(2, 3, 0), torch.ones(2, 0, 5), pad=1), torch.zeros(2, 3, 5))
    assert ops.matmul(torch.ones(0, 3, 2), torch.ones(0, 2, 5)).shape == (0, 3, 5)


def test_not_finite_numbers_pass_through(ops, kernels):
    a, b = torch.ones(1, 20, 30), torch.ones(1, 30, 40)
    a[0, 4, 7], b[0, 3, 9] = torch.nan, torch.inf
    got = ops.matmul(a, b)
    assert got[0, 4].isnan().all() and got[0, :4, 9].isinf().all() and (got[0, 5:, :9] == 30).all()


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("n", [1, 2, 300, 5000])
def test_stable_sort(ops, descending, n):
    g = torch.Generator().manual_seed(n)
    special = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42, 3.4e38])
    many = torch.randn(3, n, generator=g)
    ties = torch.randint(-3, 4, (2, n), generator=g).float() * torch.where(torch.rand(2, n, generator=g) < 0.5, 1.0, -1.0)
    odd = special[torch.randint(0, len(special), (2, n), generator=g)]
    x = torch.cat([many, ties, odd])
    for rows in (x, x.T.contiguous().T, x.repeat(1, 2)[:, ::2]):
        values, indices = ops.sort(rows, descending)
        want = torch.sort(rows, stable=True, descending=descending)
        assert torch.equal(indices, want.indices)
        assert torch.equal(values.view(torch.int32), want.values.contiguous().view(torch.int32))  # -0 stays -0


def test_cumsum(ops):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3000, generator=g) * torch.exp(4 * torch.randn(4, 3000, generator=g))
    big = torch.randint(-2**62, 2**62, (4, 50), generator=g)
    for rows in (x, x.T.contiguous().T, x[:, ::3], big, big.T.contiguous().T, torch.zeros(2, 0)):
        assert torch.equal(ops.cumsum(rows), torch.cumsum(rows, 1))
