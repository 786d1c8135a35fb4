"""The gated delta rule as a mixer: what it keeps of earlier tokens is a state, which every token replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kiln.exporter.model.caches import state_buffers
from kiln.exporter.model.parts import Norm, vector
from kiln.exporter.model.records import CacheSpec, DeltaNet


class State(nn.Module):
    """What a state's cache declares, zeros at first."""

    def __init__(self, cache: CacheSpec):
        super().__init__()
        for buffer in state_buffers(cache):
            self.register_buffer(buffer.name.rpartition(".")[2], torch.zeros(buffer.shape, dtype=buffer.dtype))


class DeltaMixer:
    """Projections, the rule with its convolution, norm and gate of each value head, projection."""

    def __init__(self, at: nn.Module, mixer: DeltaNet, eps: float, cache: CacheSpec):
        self.at, self.mixer, self.eps = at, mixer, eps
        at.ssm_conv1d, at.ssm_a, at.ssm_dt_bias = (vector(n) for n in (mixer.channels * mixer.taps, mixer.value_heads, mixer.value_heads))
        at.ssm_norm = Norm(mixer.value_dim, eps)
        at.cache = State(cache)

    def projections(self, h: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the convolution [T, C], output gates [T, V dv], alpha and beta [T, V], of matrices that the packer may have joined."""
        at, c = self.at, self.mixer
        sizes = (c.channels, c.value_size, c.value_heads, c.value_heads)
        if hasattr(at, "ssm_in_gates"):
            return at.ssm_in_gates.linear(h).split(sizes, dim=-1)
        u = at.ssm_in.linear(h)
        if hasattr(at, "ssm_gates"):
            return u, *at.ssm_gates.linear(h).split(sizes[1:], dim=-1)
        z = at.ssm_gate.linear(h)
        if hasattr(at, "ssm_alpha_beta"):
            return u, z, *at.ssm_alpha_beta.linear(h).split(sizes[2:], dim=-1)
        return u, z, at.ssm_alpha.linear(h), at.ssm_beta.linear(h)

    def __call__(self, h: Tensor, pos: Tensor) -> Tensor:  # [T, D] -> [T, D]
        at, cache = self.at, self.at.cache
        rule = torch.ops.kiln.delta_step if h.shape[0] == 1 else torch.ops.kiln.delta_chunk
        u, z, alpha, beta = self.projections(h)
        o = rule(u, alpha, beta, at.ssm_conv1d.weight, at.ssm_a.weight, at.ssm_dt_bias.weight, cache.conv_state, cache.delta_state, pos,
                 self.mixer.key_heads, self.eps)  # fmt: skip
        z = z.unflatten(-1, (-1, self.mixer.value_dim))
        return at.ssm_out.linear(torch.ops.kiln.silu_mul(z, at.ssm_norm(o)).flatten(1))
