"""What lies between two products of one token, with its root left to the product after, against plain float64."""

from __future__ import annotations

import pytest
import torch
import triton

from kiln.custom_ops.gpu.target import compiling_for, gpu_targets
from kiln.custom_ops.step import add_norm
from kiln.custom_ops.weights import fixed_point
from tests.custom_ops.interpret import interpreted

test_kernels_interpreted = interpreted(__file__)

if triton.knobs.runtime.interpret:
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain

EPS = 1e-6
LOSS = {1: 1.5e-2, 2: 6e-5, 3: 4e-7}  # relative, of bytes an activation; weights of different sizes make the largest of 256 stand out
kiln = torch.ops.kiln


def inputs(d: int, seed: int = 0) -> list[torch.Tensor]:
    """x, branch, post_weight, weight."""
    g = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(1, d, generator=g) * 20, torch.randn(1, d, generator=g) * 0.03
    return [x, branch, torch.rand(d, generator=g) * 30, torch.rand(d, generator=g) + 0.1]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def exact(x: torch.Tensor, branch: torch.Tensor, post_weight: torch.Tensor, weight: torch.Tensor,
          scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x, branch, post_weight, weight = (t.double() for t in (x, branch, post_weight, weight))
    x = x + rms(branch) * post_weight
    x = x if scale is None else x * scale.double()
    return x, rms(x) * weight


def squares(x: torch.Tensor, pieces: int = 3) -> torch.Tensor:
    """Sums of squares of the pieces of a row."""
    return torch.stack([p.square().sum() for p in x[0].tensor_split(pieces)])


def with_root(out: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The norm that `out` and the sums of squares beside it stand for, float64."""
    assert left.dtype == torch.float32 and left.dim() == 1
    return fixed_point.dequantize(out).double() * add_norm.root(left.double(), fixed_point.elements(out), EPS)


def check(d: int, terms: int, scaled: bool) -> None:
    x, branch, post_weight, weight = inputs(d)
    before = x.clone()
    scale = torch.tensor([0.37]) if scaled else None
    x_out, *rest = kiln.add_norm(x, branch, squares(branch), post_weight, scale, weight, EPS, terms)
    x_exact, out_exact = exact(x, branch, post_weight, weight, scale)
    assert x_out.dtype == torch.float32 and x_out.shape == (1, d) and torch.equal(x, before)
    assert (x_out - x_exact).norm() / x_exact.norm() < 3e-7
    fixed_point.check("out", rest[0], d, 1)
    assert fixed_point.form(rest[0]) == (terms, fixed_point.extent_of(d))
    assert (with_root(*rest) - out_exact).norm() / out_exact.norm() < LOSS[terms]

    rest = kiln.norm_fixed(x, weight, terms)
    only = rms(x.double()) * weight
    assert fixed_point.form(rest[0]) == (terms, fixed_point.extent_of(d))
    assert (with_root(*rest) - only).norm() / only.norm() < LOSS[terms]


CASES = pytest.mark.parametrize("d, terms, scaled", [(256, 2, True), (160, 1, False), (160, 3, True), (1344, 2, False), (32, 3, False)])


@CASES
def test_reference(d: int, terms: int, scaled: bool) -> None:
    check(d, terms, scaled)


@CASES
def interpreted_kernel(d: int, terms: int, scaled: bool) -> None:
    """Also of D that is no power of two."""
    with compiling_for(gpu_targets()["sm_90"]):
        check(d, terms, scaled)


def check_small() -> None:
    """The epsilon is inside the root: a branch of zeros adds nothing, a small one is not blown up."""
    x, branch, post_weight, weight = inputs(64)
    x_out, *_ = kiln.add_norm(x, torch.zeros_like(branch), torch.zeros(1), post_weight, None, weight, EPS, 2)
    assert torch.equal(x_out, x)
    small = branch * 1e-4
    x_out, *_ = kiln.add_norm(torch.zeros_like(x), small, squares(small), post_weight, None, weight, EPS, 2)
    torch.testing.assert_close(x_out, (rms(small.double()) * post_weight).float(), rtol=1e-5, atol=1e-9)


def test_small_reference() -> None:
    check_small()


def interpreted_small_kernel() -> None:
    with compiling_for(gpu_targets()["sm_90"]):
        check_small()


def check_rows(d: int, terms: int) -> None:
    """Of several tokens each is, bit for bit, what it is alone."""
    rows = [inputs(d, seed) for seed in range(3)]
    _, _, post_weight, weight = rows[0]
    x, branch = (torch.cat([row[i] * 10 ** (2 * j) for j, row in enumerate(rows)]) for i in (0, 1))
    scale, left = torch.tensor([0.37]), torch.stack([squares(b[None]) for b in branch])
    for together, alone in (
        (kiln.add_norm(x, branch, left, post_weight, scale, weight, EPS, terms),
         [kiln.add_norm(x[[i]], branch[[i]], left[i], post_weight, scale, weight, EPS, terms) for i in range(3)]),
        (kiln.add_norm(x, branch, None, None, None, None, EPS, terms),
         [kiln.add_norm(x[[i]], branch[[i]], None, None, None, None, EPS, terms) for i in range(3)]),
        (kiln.norm_fixed(x, weight, terms), [kiln.norm_fixed(x[[i]], weight, terms) for i in range(3)]),
    ):
        for i, one in enumerate(alone):
            assert all(torch.equal(found[i], own.view(found[i].shape)) for found, own in zip(together, one, strict=True))


@pytest.mark.parametrize("d, terms", [(320, 2), (64, 3)])
def test_rows_reference(d: int, terms: int) -> None:
    check_rows(d, terms)


def interpreted_rows() -> None:
    with compiling_for(gpu_targets()["sm_90"]):
        check_rows(320, 2)


def test_wrong_arguments_are_named() -> None:
    x, branch, post_weight, weight = inputs(64)
    for wrong, w, message in (
        (x.bfloat16(), weight, "x is torch.bfloat16"),
        (x[:, :48].contiguous(), weight[:48], r"x is torch.float32 \(1, 48\).* D a multiple of 32"),
        (x, weight[:32], r"weight \(32,\)"),
        (x[0], weight, r"x is torch.float32 \(64,\)"),
    ):
        with pytest.raises(ValueError, match=f"add_norm: .*{message}"):
            kiln.add_norm(wrong, branch, squares(branch), post_weight, None, w, EPS, 2)
        with pytest.raises(ValueError, match=f"norm_fixed: .*{message}"):
            kiln.norm_fixed(wrong, w, 2)
    with pytest.raises(ValueError, match=r"add_norm: branch \(1, 32\)"):
        kiln.add_norm(x, branch[:, :32], squares(branch), post_weight, None, weight, EPS, 2)
    with pytest.raises(ValueError, match=r"add_norm: .* squares \(0,\)"):
        kiln.add_norm(x, branch, torch.zeros(0), post_weight, None, weight, EPS, 2)
    with pytest.raises(ValueError, match=r"add_norm: .* squares \(3,\), .* expected \(2, 64\), \(2, P\)"):
        kiln.add_norm(x.repeat(2, 1), branch.repeat(2, 1), squares(branch), post_weight, None, weight, EPS, 2)
    with pytest.raises(ValueError, match=r"add_norm: .* scale \(64,\)"):
        kiln.add_norm(x, branch, squares(branch), post_weight, weight, weight, EPS, 2)


class Norms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in zip(("post_weight", "weight"), inputs(64)[2:], strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor, branch: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, fixed, left = kiln.add_norm(x, branch, squares, self.post_weight, None, self.weight, EPS, 2)
        return x, fixed, left, *kiln.norm_fixed(x, self.weight, 2)


def test_opaque_when_exported() -> None:
    x, branch, *_ = inputs(64)
    arguments = x, branch, squares(branch)
    program = torch.export.export(Norms(), arguments, strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if "getitem" not in t] == ["kiln.add_norm.default", "kiln.norm_fixed.default"]
    assert all(torch.equal(a, b) for a, b in zip(program.module()(*arguments), Norms()(*arguments), strict=True))


def test_kernel_cases_are_what_is_launched() -> None:
    for case in add_norm.kernel_cases(gpu_targets()["sm_90"]):
        assert set(case.signature) | set(case.constexprs) == set(case.fn.arg_names)
