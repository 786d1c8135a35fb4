"""Trains gemma4-nano's drafter and writes it as GGUF: python -m tests.nano.drafter --out FILE

One core, minutes. It is of the real drafter's architecture: four layers over the keys and values of the model's last sliding and last full
layer. It learns the model's distributions over generated text (`data.py`), for a token and the two after it, each from the row that the one
before left, as it is asked when it drafts. What the model makes of a text is computed once, and read several times.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiln.exporter.model.records import Attention, Dense, DraftConfig, Layer
from kiln.exporter.source.plan import read_plan
from kiln.exporter.tools.quantize import quantize
from tests.nano import data, evals
from tests.nano.model import Nano, Weight, attend, load_gguf, norm, rotate
from tests.tools.drafters import draft_config, write_drafter

HERE = Path(__file__).parent
TARGET = HERE / "gemma4-nano-Q4_K_M.gguf"
NAME = "gemma4-nano-assistant"


@dataclass
class Read:
    """What the model makes of sequences [B, T]: rows behind its last norm, keys and values by layer; float16."""

    tokens: Tensor
    pos: Tensor
    counted: Tensor  # targets that are text
    hidden: Tensor
    kv: dict[int, tuple[Tensor, Tensor]]


class DraftLayer(nn.Module):
    def __init__(self, config: DraftConfig, layer: Layer):
        super().__init__()
        c, d, ffn = layer.mixer, config.hidden_size, layer.ffn
        assert isinstance(c, Attention) and isinstance(ffn, Dense)
        self.mixer, self.eps = c, config.rms_norm_eps
        self.attn_norm, self.ffn_norm = Weight(d, fill=1.0), Weight(d, fill=1.0)
        self.post_attention_norm, self.post_ffw_norm = Weight(d, fill=0.3), Weight(d, fill=0.3)
        self.attn_q_norm = Weight(c.head_dim, fill=c.head_dim**-0.25)
        self.attn_q, self.attn_output = Weight(c.q_dim, d, std=d**-0.5), Weight(d, c.q_dim, std=c.q_dim**-0.5)
        self.ffn_gate, self.ffn_up = Weight(ffn.size, d, std=d**-0.5), Weight(ffn.size, d, std=d**-0.5)
        self.ffn_down = Weight(d, ffn.size, std=ffn.size**-0.5)
        self.layer_output_scale = Weight(1, fill=1.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """x [B, T, D]; k, v [B, KV, S, hd]; seen [B, 1, T, S]."""
        q = F.linear(norm(x, self.attn_norm.weight, self.eps), self.attn_q.weight).unflatten(-1, (-1, self.mixer.head_dim)).transpose(1, 2)
        out = attend(rotate(norm(q, self.attn_q_norm.weight, self.eps), cos, sin), k, v, seen).transpose(1, 2).flatten(2)
        x = x + norm(F.linear(out, self.attn_output.weight), self.post_attention_norm.weight, self.eps)
        h = norm(x, self.ffn_norm.weight, self.eps)
        f = F.gelu(F.linear(h, self.ffn_gate.weight), approximate="tanh") * F.linear(h, self.ffn_up.weight)
        x = x + norm(F.linear(f, self.ffn_down.weight), self.post_ffw_norm.weight, self.eps)
        return x * self.layer_output_scale.weight


class Drafter(nn.Module):
    """Parameters carry the file's names. It begins as the model's own rows and embeddings, projected to its width."""

    def __init__(self, config: DraftConfig, target: Nano, rows: Tensor):
        super().__init__()
        self.config, self.target, d = config, [target], config.hidden_size
        embedding = target.token_embd.weight.detach()
        basis = torch.linalg.eigh(embedding.T @ embedding)[1][:, -d:].T  # [d, D], what embeddings differ in
        self.token_embd, self.output_norm = Weight(config.vocab_size, d, fill=0.0), Weight(d, fill=1.0)
        self.nextn = nn.ModuleDict({"pre_projection": Weight(d, 2 * config.target_hidden, std=0.2 * config.target_hidden**-0.5),
                                    "post_projection": Weight(config.target_hidden, d, fill=0.0)})  # fmt: skip
        size = (rows @ basis.T).pow(2).mean().sqrt()
        with torch.no_grad():
            self.token_embd.weight.copy_(embedding @ basis.T)
            self.nextn["pre_projection"].weight[:, config.target_hidden :] += basis / size
            self.nextn["post_projection"].weight.copy_(basis.T)
            self.output_norm.weight.fill_(float(size))
        self.blk = nn.ModuleList(DraftLayer(config, layer) for layer in config.layers)

    def start(self, read: Read) -> tuple[Any, ...]:
        """Of all tokens but the first of each sequence: tables and keys by layer, at each token's own position, and what it sees."""
        target, at = self.target[0], read.pos[:, 1:]
        distance = at[:, None, :, None] - read.pos[:, None, None, :]
        places = torch.arange(read.pos.shape[1])
        earlier = places[1:, None] > places[None, :]
        found = []
        for layer in self.config.layers:
            c = layer.mixer
            assert isinstance(c, Attention) and c.kv_from is not None
            angle = at.float()[:, None, :, None] * getattr(target, c.rope.constant)
            k, v = (x.float() for x in read.kv[c.kv_from])
            found.append((angle.cos(), angle.sin(), k, v, earlier & (distance < c.window) if c.window else earlier.expand_as(distance)))
        return tuple(found)

    def draft(self, tokens: Tensor, hidden: Tensor, start: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """tokens [B, T], hidden [B, T, D] -> logits [B, T, V], the next one's hidden."""
        e = F.embedding(tokens, self.target[0].token_embd.weight) * math.sqrt(self.config.target_hidden)
        x = F.linear(torch.cat((e, hidden), -1), self.nextn["pre_projection"].weight)
        for layer, given in zip(self.blk, start, strict=True):
            x = layer(x, *given)
        y = norm(x, self.output_norm.weight, self.config.rms_norm_eps)
        return F.linear(y, self.token_embd.weight), F.linear(y, self.nextn["post_projection"].weight)


@torch.no_grad()
def read(target: Nano, batch: data.Batch, layers: set[int]) -> Read:
    tokens, pos, _, classes = evals.tensors(batch, "cpu")
    pos = torch.arange(pos.shape[1]).expand_as(pos)  # no jumps: a draft's token stands behind the newest key
    hidden = target.hidden(tokens, pos)
    kv = {i: tuple(x.half() for x in target.blk[i].kept) for i in layers}
    return Read(tokens, pos, classes != data.IGNORED, hidden.half(), kv)


def losses(drafter: Drafter, found: Read, depth: int) -> list[tuple[Tensor, Tensor]]:
    """Of each place of a draft the cross entropy to the model's distribution, and how often the likeliest token is the model's."""
    target, start = drafter.target[0], drafter.start(found)
    rows, out = found.hidden.float(), []
    with torch.no_grad():
        goal = target.logits(rows).softmax(-1)
    hidden = rows[:, :-1]
    for j in range(depth):
        if j:  # the last token's successor is not known: a sequence gets shorter
            start = tuple((cos[:, :, :-1], sin[:, :, :-1], k, v, seen[:, :, :-1]) for cos, sin, k, v, seen in start)
            hidden = hidden[:, :-1]
        logits, hidden = drafter.draft(found.tokens[:, 1 + j :], hidden, start)
        counted, wanted = found.counted[:, 1 + j :], goal[:, 1 + j :]
        loss = -(wanted * logits.log_softmax(-1)).sum(-1)[counted].mean()
        out.append((loss, (logits.argmax(-1) == wanted.argmax(-1))[counted].float().mean()))
    return out


def write(drafter: Drafter, path: Path, kind: str) -> None:
    """Matrices as `kind`, vectors as F32."""
    state = drafter.state_dict()
    half = max(mixer.head_dim for mixer in drafter.config.attentions.values()) // 2
    state["rope_freqs.weight"] = torch.where(torch.arange(half) < half // 4, 1.0, 1e30)
    values = {name: x.detach().float().numpy() for name, x in state.items()}
    write_drafter(drafter.config, path, kind, lambda name, shape, kind: quantize(kind, values[name].reshape(-1, shape[-1])))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE / f"{NAME}-Q4_0.gguf")
    p.add_argument("--kind", default="Q4_0")
    p.add_argument("--minutes", type=float, default=16, help="of training and of what the model makes of its text")
    p.add_argument("--batches", type=int, default=100, help="that are read again and again")
    p.add_argument("--passes", type=float, default=5, help="over them")
    p.add_argument("--count", type=int, default=8, help="sequences of a batch")
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--depth", type=int, default=3, help="places of a draft")
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--ffn", type=int, default=256)
    p.add_argument("--heads", type=int, default=1)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    began, plan, target = time.monotonic(), read_plan(TARGET), load_gguf(TARGET)
    config = draft_config(NAME, target.config, a.hidden, a.ffn, a.heads)
    layers = {mixer.kv_from for mixer in config.attentions.values() if mixer.kv_from is not None}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        assert plan.tokenizer is not None
        plan.tokenizer.write(tokenizer)

        def text(stream: str, index: int) -> Read:
            return read(target, data.make(str(tokenizer), a.seed, stream, index, a.count, a.length), layers)

        tests, kept = [text("held-out-drafts", i) for i in range(2)], []
        drafter = Drafter(config, target, tests[0].hidden.float())
        print(f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.2f} M parameters", flush=True)
        matrices, vectors = ([p for p in drafter.parameters() if (p.ndim == 2) == m] for m in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98))
        steps, end = int(a.batches * a.passes), a.minutes * 60
        for step in range(steps):
            if len(kept) < a.batches:
                kept.append(text("drafts", len(kept)))
            share = max(step / steps, (time.monotonic() - began) / end)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = a.lr * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            optimizer.zero_grad(set_to_none=True)
            # the newest while the model still reads, then all by turns
            found = kept[step % a.batches]
            sum(loss for loss, _ in losses(drafter, found, a.depth)).backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 20 == 0 or step + 1 == steps:
                with torch.no_grad():
                    each = [losses(drafter, found, a.depth) for found in tests]
                places = [[sum(float(e[j][k]) for e in each) / len(tests) for k in range(2)] for j in range(a.depth)]
                shown = "  ".join(f"{loss:.3f} {right:.3f}" for loss, right in places)
                print(f"{time.monotonic() - began:5.0f} s, step {step + 1}/{steps}, held-out loss, right: {shown}", flush=True)
                write(drafter, a.out, a.kind)
    write(drafter, a.out, a.kind)
    print(f"{a.out}: {a.out.stat().st_size} bytes after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
