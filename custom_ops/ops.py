"""Importing this module registers every `torch.ops.kiln` operator."""

from kiln.custom_ops import markers  # noqa: F401
from kiln.custom_ops.attention import (  # noqa: F401
    global_attention,
    prepare,
    row_attention,
    sliding_attention,
    sliding_decode,
    sliding_rows,
)
from kiln.custom_ops.chain import chain  # noqa: F401
from kiln.custom_ops.delta import chunk  # noqa: F401
from kiln.custom_ops.delta import decode as delta_decode  # noqa: F401
from kiln.custom_ops.delta import step as delta_step  # noqa: F401
from kiln.custom_ops.experts import branches, route, router  # noqa: F401
from kiln.custom_ops.experts import decode as expert_decode  # noqa: F401
from kiln.custom_ops.experts import linear as expert_linear  # noqa: F401
from kiln.custom_ops.step import add_norm, gate, sample  # noqa: F401
from kiln.custom_ops.tq4 import attention, codec, decode, decode_rows, rows  # noqa: F401
from kiln.custom_ops.weights import embedding, gemv, linear, matmul  # noqa: F401
