"""Parts of the decoder under a name: what passes look for. Where none takes one, the compiler sees the plain operations inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_library = torch.library.Library("kiln", "FRAGMENT")


def _composite(schema: str):
    def register(fn):
        name = _library.define(schema)
        _library.impl(name, fn, "CompositeImplicitAutograd")
        return fn

    return register


@_composite("rms_norm(Tensor x, Tensor? weight, float eps, ScalarType dtype) -> Tensor")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm over the last axis in float32, the epsilon inside the root, the result in `dtype`."""
    xf = x.float()
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(dtype)


@_composite("rope(Tensor x, Tensor cos, Tensor sin, float scale=1.0, bool neighbours=False) -> Tensor")
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0, neighbours: bool = False) -> torch.Tensor:
    """Rotate the halves of the last axis, or with `neighbours` its even elements against the odd ones, and multiply by `scale`.

    x [T, heads, D]; cos, sin [T, R / 2] float32: the first R dimensions turn, the others stay. The result has the first of each pair before
    all of the second, whichever the pairs were: queries and keys in the same order have the same products.
    """
    xf, turned = x.float(), 2 * cos.shape[-1]
    head = xf if turned == x.shape[-1] else xf[..., :turned]
    a, b = (head[..., 0::2], head[..., 1::2]) if neighbours else head.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    left = () if turned == x.shape[-1] else (xf[..., turned:],)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin, *left), dim=-1)
    return (y if scale == 1 else y * scale).to(x.dtype)


@_composite("gelu_mul(Tensor gate, Tensor value) -> Tensor")
def gelu_mul(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * value in float32, GELU with tanh; the result in their dtype."""
    return (F.gelu(gate.float(), approximate="tanh") * value.float()).to(gate.dtype)


@_composite("silu_mul(Tensor gate, Tensor value) -> Tensor")
def silu_mul(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value in float32; the result in their dtype."""
    return (F.silu(gate.float()) * value.float()).to(gate.dtype)


GATED = {"gelu_tanh": torch.ops.kiln.gelu_mul, "silu": torch.ops.kiln.silu_mul}  # by the activation
