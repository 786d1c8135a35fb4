"""The reference dequantization once for a weight: token by token through a plain model, it is two thirds of the time of the tests.

`dequantize` is a function of the bytes it reads (tests/custom_ops/weights/test_layouts.py); who calls it is told a weight's values again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from kiln.custom_ops.weights import gemv, linear

Dequantize = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
MOST_BYTES = 256 << 20
READERS = (gemv, linear)


def _key(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def once(dequantize: Dequantize) -> Dequantize:
    """dequantize, which keeps up to MOST_BYTES of what it gave, with the planes, so that their memory is no other's meanwhile."""
    kept: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = OrderedDict()
    used = 0

    def found(block_type: str, words: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        nonlocal used
        # Tensors of a trace have no bytes, and one made in inference mode does not count its changes.
        if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.is_inference() for t in (words, halves)):
            return dequantize(block_type, words, halves)
        key = (block_type, _key(words), _key(halves))
        if key not in kept:
            dense = dequantize(block_type, words, halves)
            kept[key] = (dense, words, halves)
            used += dense.nbytes
            while used > MOST_BYTES:
                used -= kept.popitem(last=False)[1][0].nbytes
            return dense
        kept.move_to_end(key)
        return kept[key][0]

    return found
