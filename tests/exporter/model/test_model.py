"""The plain decoder against the reference logits, eager, exported and after every pass."""

from __future__ import annotations

import pytest
import torch

from kiln.exporter.compiler.trace import trace
from tests.timeline import FIXTURES, TOLERANCE, all_ways, fixture_logits, fixture_tokens, graph_spec, lowered_to, programs, weights, worst

TINY = FIXTURES / "gemma4-tiny-dense.gguf"


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, torch.Tensor]:
    return weights(TINY, tmp_path_factory.mktemp("weights"))


def check(start) -> None:
    for way, rows in all_ways(start, fixture_tokens()).items():
        error = worst(rows, fixture_logits())
        print(f"{way}: {len(rows)} positions, max |dlogit| {error:.2e}")
        assert error <= TOLERANCE, way


def test_eager(state):
    spec = graph_spec(TINY)

    def start():
        model = spec.model()
        missing = model.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys and all(".cache." in k for k in missing.missing_keys)
        return model, model

    with torch.inference_mode():
        check(start)


def test_exported(state):
    spec = graph_spec(TINY)
    with torch.no_grad():
        check(programs(spec, state, lambda entry: trace(spec, entry, "cpu")))


@pytest.mark.parametrize("last", ["index_copy", "kv_len", "chunked_lm_head", "free_kv_buffers"])
def test_after_each_pass(state, last):
    """The graph as it is right after pass `last`; turboquant is off, the head is cut in small pieces."""
    spec = graph_spec(TINY, materialized_head_budget=64 << 10)

    with torch.no_grad():
        check(programs(spec, state, lambda entry: lowered_to(spec, entry, last)))


@pytest.mark.parametrize("mix", ["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"])
def test_quantized_model_is_the_float_model_of_its_values(mix, tmp_path):
    """Packed planes through the ops equal a float32 decoder over gguf's own dequantization."""
    import dataclasses

    import gguf
    import numpy as np

    from kiln.exporter.source.gguf import open_gguf

    path = FIXTURES / f"gemma4-tiny-dense-wide-{mix}.gguf"
    spec = graph_spec(path)
    quantized = spec.model()
    quantized.load_state_dict(weights(path, tmp_path), strict=False)

    file = open_gguf(path)
    plan = [dataclasses.replace(p, block_type="F32") if p.K else p for p in spec.plan]
    plain = dataclasses.replace(spec, plan=tuple(plan)).model()
    state = weights(path, tmp_path)
    for p in plan:
        if p.K:
            rows = [gguf.quants.dequantize(np.asarray(file.data(s)), gguf.GGMLQuantizationType[file.tensors[s].type]) for s in p.sources]
            state[f"{p.name}.weight"] = torch.from_numpy(np.concatenate([r.reshape(-1, p.K) for r in rows]))
    plain.load_state_dict({k: v for k, v in state.items() if not k.endswith((".words", ".halves"))}, strict=False)
    tokens = fixture_tokens("gemma4-tiny-dense-wide")
    with torch.inference_mode():
        from tests.timeline import feed

        got, want = (feed(m, m, tokens, 24) for m in (quantized, plain))
    assert max((got[i] - want[i]).abs().max().item() for i in want) < 2e-4
