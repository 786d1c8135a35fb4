"""Programmatic dependent launch: a kernel may start while the one before it drains, and waits before it touches what others wrote.

Before `wait_for_earlier_kernels` a kernel may read weights, the step's position and what earlier steps wrote, and nothing else: no kernel
of its own step can be taken as finished. Both calls do nothing in a kernel that was launched the usual way. A thread block with nothing to
do may end without waiting as long as one of its kernel waits. `EARLY` is a constant of the kernels: architectures before sm_90 lack the
instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from custom_ops.gpu.target import GpuTarget, current_target

# What these names begin has every thread block wait before it reads what a kernel of its step wrote, and before it writes.
WAITING_KERNELS = (
    "gemv", "fix_kernel", "add_norm_kernel", "prepare_kernel", "rope_table_kernel", "sliding_decode_kernel", "flash_decode_kernel",
    "flash_merge_kernel", "rotate_kernel", "tq4_write_kernel", "tq4_prepare_kernel", "tq4_decode_kernel", "tq4_merge_kernel",
)  # fmt: skip
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # cannot run assembly


def early(target: GpuTarget | None = None) -> bool:
    """The value of EARLY for a target, without one for the current."""
    return not triton.knobs.runtime.interpret and (target or current_target()).sm >= 90


@triton.jit
def wait_for_earlier_kernels(EARLY: tl.constexpr):
    if EARLY and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
