"""TQ4 caches with an exact window, and attention over them in float64 loops that share nothing with the ops; used by the tests."""

from __future__ import annotations

import torch

from kiln.custom_ops.tq4 import codec


def codes_of(x: torch.Tensor, slots: int, used: int) -> list[torch.Tensor]:
    """codes and scales of x [N, KV, D] with `slots` slots, garbage but in the first `used`."""
    codes, scales = codec.encode(x[:used].transpose(0, 1))
    all_codes = torch.full((x.shape[1], slots, x.shape[2] // 4), 0x7BDE, dtype=torch.int16)
    all_scales = torch.full((x.shape[1], slots), float("nan"), dtype=torch.float16)
    all_codes[:, :used], all_scales[:, :used] = codes, scales
    return [all_codes, all_scales]


def ring_of(x: torch.Tensor, first: int, exact_window: int) -> torch.Tensor:
    """The exact window before position `first`, [R, KV, D]: garbage in every slot that no query from `first` on may read."""
    garbage = torch.tensor([float("nan"), float("inf"), -1e30, 1000.0]).to(x.dtype)
    ring = garbage.repeat(x.shape[2] // 4).expand(exact_window, *x.shape[1:]).clone()
    for p in range(max(first - exact_window + 1, 0), first):
        ring[p % exact_window] = x[p]
    return ring


def center_of(k: torch.Tensor, exact_window: int) -> torch.Tensor:
    """The mean of the keys of three quarters of an exact window, float32 [KV, D]; no numbers where k [N, KV, D] has not so many."""
    count = exact_window * 3 // 4
    return (k[:count].double().sum(0) / count if len(k) >= count else torch.full(k.shape[1:], float("nan"))).float()


def state(k: torch.Tensor, v: torch.Tensor, slots: int, first: int, exact_window: int,
          center: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """What `tq4_attention` takes after q, up to pos, for queries at positions first .. N - 1 of k and v [N, KV, D]; keys are coded less
    `center`.

    Garbage wherever no query reads, the codes of the newest positions included.
    """
    coded = max(k.shape[0] - exact_window, 0)
    codes = [t for x in (less(k, center), v) for t in codes_of(x, slots, coded)]
    rings = [ring_of(x, first, exact_window) for x in (k, v)]
    return k[first:].clone(), v[first:].clone(), *codes, *rings


def less(k: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    return k if center is None else k.float() - center


def decoded(x: torch.Tensor) -> torch.Tensor:
    """What the codec makes of x [N, KV, D], in float64."""
    codes, scales = codec.encode(x)
    return codec.unrotate(codec.decode_rotated(codes, scales).double())


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, exact_window: int,
          center: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of q [T, H, D] from position `first` on to k and v [N, KV, D], in float64, one query head at a time; keys are coded less
    `center`.
    """
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    k_coded, v_coded = decoded(less(k, center)), decoded(v)
    if center is not None:
        k_coded = k_coded + center.double()
    for t in range(q.shape[0]):
        p = first + t
        old = max(p - exact_window + 1, 0)  # the first position that is read exactly
        for h in range(q.shape[1]):
            keys, values = (
                torch.cat([coded[:old, h // group], x[old : p + 1, h // group].double()]) for coded, x in ((k_coded, k), (v_coded, v))
            )
            out[t, h] = torch.softmax(keys @ q[t, h].double(), 0) @ values
    return out
