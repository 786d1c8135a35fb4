"""Ops that torch.export and the passes must see whole."""

from __future__ import annotations

from collections.abc import Callable

import torch


def check_whole(model: Callable[[], torch.nn.Module], args: tuple, longer: tuple, most: int, *ops: str) -> None:
    """Exported for 2 to `most` tokens, the model calls each of the ops once and no part of them, and plays `longer` as it does eagerly.

    args, longer: tensors [T, ...]; `model` makes it anew, with its caches empty.
    """
    tokens = torch.export.Dim("T", min=2, max=most)
    program = torch.export.export(model(), args, dynamic_shapes=({0: tokens},) * len(args), strict=False)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(names.count(f"kiln.{op}.default") == 1 for op in ops)
    assert not any("matmul" in name or "softmax" in name for name in names)
    torch.testing.assert_close(program.module()(*longer), model()(*longer))
