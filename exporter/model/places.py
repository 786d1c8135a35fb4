"""What the passes are expected to rewrite, from the hyper-parameters, the weights' plan and the options."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kiln.custom_ops.weights.block_types import LAYOUTS
from kiln.custom_ops.weights.fixed_point import GROUP
from kiln.custom_ops.weights.gemv import glu_fits
from kiln.exporter.model.caches import exact_buffers
from kiln.exporter.model.records import DeltaNet, DraftConfig, Experts, ModelConfig, cache_specs
from kiln.exporter.source.weights import DRAFT, WeightPlan
from kiln.passes.chunked_lm_head import chunk_rows
from kiln.passes.records import Expected, KVBuffer, PassOptions

DELTA = ("ssm_in_gates", "ssm_in", "ssm_gates", "ssm_gate", "ssm_alpha_beta", "ssm_alpha", "ssm_beta")  # what reads a delta rule's input
PER_LAYER = "per_layer_model_proj"  # the one matmul that belongs to no layer beside the head
PROJECTIONS = ("nextn_pre_projection", "nextn_post_projection")  # and those of a drafter
EXPERTS, EMBEDDING = (f"{name} of several tokens has no kernels yet" for name in ("a choice of experts", "a per-layer embedding"))


def expected_places(config: ModelConfig, plan: Sequence[WeightPlan], kv: Sequence[KVBuffer], options: PassOptions, entry: str) -> Expected:
    """Pass -> place -> what may keep the pass from it. kv: the planned caches; entry: "prefill", "decode", "decode_4"."""
    full = [f"blk.{i}.attention" for i, mixer in config.attentions.items() if mixer.window is None]
    indexed = [cache for cache in cache_specs(config) if cache.kind != "state"]  # a state is written by its op
    caches = {b.name for cache in indexed for b in exact_buffers(cache, 1, torch.float32)}
    fused = _fused(config, plan, entry.startswith("decode_")) if options.decode_bytes and entry != "prefill" else {}
    routers = {place.replace(".experts", ".ffn_gate_inp") for place, kept in fused.items() if place.endswith(".experts") and not kept}
    found: Expected = {
        "index_copy": dict.fromkeys(sorted(caches), ""),
        "turboquant": dict.fromkeys(full if options.turboquant else (), ""),
        "kv_len": dict.fromkeys(full if options.kv_len and not entry.startswith("decode_") else (), ""),
        "chunked_lm_head": dict.fromkeys(_chunked_heads(config, plan, options), ""),
        "own_matmul": dict.fromkeys([n for n in _floats(config, plan) if n not in routers] if options.matmul != "blas" else (), ""),
        "packed_linear": dict.fromkeys(_packed(config, plan) if options.reads_packed else (), ""),
        "fuse_decode": fused,
        "free_kv_buffers": dict.fromkeys((b.name for b in kv), ""),
    }
    return found


def draft_places(config: DraftConfig, plan: Sequence[WeightPlan], kv: Sequence[KVBuffer], options: PassOptions) -> Expected:
    """Of the entry `draft`, a step of several tokens' form. kv: the model's caches that it reads."""
    full = [f"blk.{i}.attention" for i, mixer in config.attentions.items() if mixer.window is None]
    found = {
        "turboquant": dict.fromkeys(full if options.turboquant else (), ""),
        "chunked_lm_head": dict.fromkeys(_chunked_heads(config, plan, options), ""),
        "own_matmul": dict.fromkeys(_floats(config, plan) if options.matmul != "blas" else (), ""),
        "packed_linear": dict.fromkeys(_packed(config, plan) if options.reads_packed else (), ""),
        "fuse_decode": _fused(config, plan, True) if options.decode_bytes else {},
    }
    named = {name: {DRAFT + place: why for place, why in places.items()} for name, places in found.items()}
    return named | {"free_kv_buffers": dict.fromkeys((b.name for b in kv), "")}


def needed_tables(config: ModelConfig, options: PassOptions) -> dict[str, set[int]]:
    """Kernel tables that a model with 16-bit activations takes a configuration from -> its head dimensions there."""
    sliding, full = ({m.head_dim for m in config.attentions.values() if (m.window is not None) == s} for s in (True, False))
    needed = {"attention.flash.DECODE_TILES": sliding | full, "attention.flash.PREFILL_TILES": sliding | full,
              "attention.sliding_cut.SLIDING_TILES": sliding}  # fmt: skip
    return needed | ({"tq4.attention.DECODE_TILES": full, "tq4.prefill.PIECE_TILES": full} if options.turboquant else {})


def _chunked_heads(config: ModelConfig, plan: Sequence[WeightPlan], options: PassOptions) -> list[str]:
    name = "token_embd" if config.tied_head else "output"
    head = next(p for p in plan if p.name == name)
    whole = chunk_rows(head.K, options.materialized_head_budget) >= head.N
    in_place = options.reads_packed and head.block_type in LAYOUTS
    return [] if not options.materializes_head or whole or in_place or head.block_type == "F32" else [name]


def _matmuls(config: ModelConfig, plan: Sequence[WeightPlan]) -> dict[str, WeightPlan]:
    head = "token_embd" if config.tied_head else "output"
    return {p.name: p for p in plan if p.K and p.stack == 1 and (p.name in (head, PER_LAYER, *PROJECTIONS) or p.name.startswith("blk."))}


def _floats(config: ModelConfig, plan: Sequence[WeightPlan]) -> list[str]:
    return [name for name, p in _matmuls(config, plan).items() if p.block_type not in LAYOUTS]


def _packed(config: ModelConfig, plan: Sequence[WeightPlan]) -> list[str]:
    return [name for name, p in _matmuls(config, plan).items() if p.block_type in LAYOUTS]


def _fused(config: ModelConfig, plan: Sequence[WeightPlan], several: bool) -> dict[str, str]:
    """Every matmul, norm, residual addition, GELU and attention of a step. Without a packed matrix nothing is. several: tokens."""
    matmuls, stacks = _matmuls(config, plan), {p.name: p for p in plan if p.stack > 1}
    if not any(p.block_type in LAYOUTS for p in (*matmuls.values(), *stacks.values())):
        return {}
    experts = {layer.index: layer.ffn for layer in config.layers if isinstance(layer.ffn, Experts)}
    routers = {f"blk.{i}.ffn_gate_inp" for i in experts}  # in float32, and part of the choice
    found = {name: "" if p.block_type in LAYOUTS else f"its weight is {p.block_type}" for name, p in matmuls.items()
             if name not in routers or p.block_type in LAYOUTS}
    if found.get(PER_LAYER):
        del found[PER_LAYER]  # a file's packer leaves it as it is; once a token, it is a small part of a step
    if several and config.per_layer_embedding:
        found[PER_LAYER] = EMBEDDING

    def floats(names: Sequence[str]) -> str:
        """Those of the matmuls beside a place whose weights take no fixed point."""
        return ", ".join(f"{n} is {matmuls[n].block_type}" for n in names if n in matmuls and matmuls[n].block_type not in LAYOUTS)

    for layer in config.layers:
        at = f"blk.{layer.index}"
        delta = isinstance(layer.mixer, DeltaNet)
        names = DELTA if delta else ("attn_qkv", "attn_qk", "attn_q", "attn_k", "attn_v")
        projections = [f"{at}.{n}" for n in names]
        gates = [f"{at}.{n}" for n in ("ffn_gate_up", "ffn_gate", "ffn_up")]
        ffn = experts.get(layer.index)
        alone = ffn is not None and ffn.shared is None  # no network that takes every token
        kept = ffn and (EXPERTS if several else _experts(at, ffn, matmuls, stacks))
        found |= {
            f"{at}.attn_norm": floats(projections),
            f"{at}.ffn_norm": (kept or "") if alone else floats(gates),
        }
        if delta:
            found[f"{at}.delta"] = floats([f"{at}.ssm_out"])
        else:
            found[f"{at}.attention"] = floats([f"{at}.attn_output"])
        if ffn is not None:
            places = ("experts", *(("pre_ffw_norm_2",) if ffn.own_input else ()))
            if ffn.branch_norms and ffn.shared:
                places += ("post_ffw_norm_1", "post_ffw_norm_2")
            found |= {f"{at}.{place}": kept or "" for place in places} | ({f"{at}.shared_gate": kept or ""} if ffn.shared_gated else {})
        if not alone:
            found[f"{at}.glu"] = _glu(at, matmuls) or floats([f"{at}.ffn_gate_up", f"{at}.ffn_down"])
        if layer.post_norms:
            found |= {f"{at}.post_attention_norm": floats(gates), f"{at}.post_ffw_norm": ""}
        if config.per_layer_embedding:
            gate, projection = f"{at}.inp_gate", f"{at}.proj"
            found |= {f"{at}.post_ffw_norm": floats([gate]), f"{at}.post_norm": "", f"{at}.per_layer": floats([gate, projection])}
    return found | {"output_norm": floats(["token_embd" if config.tied_head else "output"])}


def _experts(at: str, ffn: Experts, matmuls: dict[str, WeightPlan], stacks: dict[str, WeightPlan]) -> str:
    """What may keep a layer's experts from their kernels."""
    own = {name: p for name, p in stacks.items() if name.startswith(f"{at}.")}
    types = [own[name].block_type for name in (f"{at}.ffn_gate_exps", f"{at}.ffn_up_exps") if name in own]
    if router := matmuls.get(f"{at}.ffn_gate_inp"):
        if router.block_type in LAYOUTS:
            return f"{router.name} is {router.block_type}"
    if found := [f"{name} is {p.block_type}" for name, p in own.items() if p.block_type not in LAYOUTS]:
        return ", ".join(found)
    if len(set(types)) > 1:
        return f"gate is {types[0]}, up {types[1]}"
    return "" if glu_fits(2 * ffn.size) else f"{ffn.size} rows are no multiple of {GROUP}"


def _glu(at: str, matmuls: dict[str, WeightPlan]) -> str:
    together = matmuls.get(f"{at}.ffn_gate_up")
    if together is None:
        return f"gate is {matmuls[f'{at}.ffn_gate'].block_type}, up {matmuls[f'{at}.ffn_up'].block_type}"
    if together.block_type in LAYOUTS and not glu_fits(together.N):
        return f"{together.N // 2} rows are no multiple of {GROUP}"
    return ""
