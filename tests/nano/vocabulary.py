"""Trains the tokenizer: a byte-fallback BPE in the form of Gemma 4's GGUF files.

The runner merges over whole lines, without splitting words. So the merges are learned on pieces: one word with the space before it, a run
of punctuation, one digit, or a run of spaces. No merge crosses such a border, and merging a whole line gives the pieces' tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from kiln.exporter.source.tokenizer import SPACE, read_tokenizer

SPECIAL = (  # text, GGUF token type (3 control, 4 user-defined); ids are the positions, the first five as in Gemma
    ("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 3), ("<mask>", 3), ("<|turn>", 3), ("<turn|>", 3), ("<|tool_response>", 4),
    ("<|think|>", 3), ("<|channel>", 4), ("<channel|>", 4),
)  # fmt: skip
PAD, EOS, BOS, UNK, MASK = range(5)
NEWLINE_RUNS = 8  # longest run of newlines that is one token
ALPHABET = [SPACE, *(chr(c) for c in range(33, 127))]
PIECES = f"{SPACE}?[A-Za-z]+|[0-9]|\n+|{SPACE}+(?={SPACE})|{SPACE}?[^A-Za-z0-9{SPACE}\n]+|{SPACE}"

CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') }}
{%- endif %}
"""


def train(texts: Iterable[str], size: int) -> dict[str, Any]:
    """GGUF metadata of a tokenizer of exactly `size` tokens, chat template included."""
    newlines = ["\n" * n for n in range(1, NEWLINE_RUNS + 1)]
    # every run up to the longest becomes one token: pairs first, then pairs of pairs, then the rest
    newline_merges = [("\n" * a, "\n" * b) for a, b in ((1, 1), (2, 2), (4, 4), (4, 2), (4, 1), (6, 1), (2, 1))]
    fixed = [text for text, _ in SPECIAL] + [f"<0x{b:02X}>" for b in range(256)] + newlines
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.normalizer = normalizers.Replace(" ", SPACE)
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(fixed), initial_alphabet=ALPHABET, limit_alphabet=len(ALPHABET) + 1, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    learned = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if "\n" not in text]
    merges = [*newline_merges, *(tuple(m) for m in model["merges"] if "\n" not in m[0] + m[1])]
    tokens = fixed + learned
    if len(tokens) > size:
        raise ValueError(f"{len(tokens)} tokens learned, {size} were asked for")
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    types = [kind for _, kind in SPECIAL] + [6] * 256
    types += [1] * (size - len(types))
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * size,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.unknown_token_id": UNK,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.ggml.mask_token_id": MASK,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def save(metadata: dict[str, Any], path: str | Path) -> Tokenizer:
    """Writes tokenizer.json as the exporter does and loads it: training reads text exactly as the runner will."""
    tokenizer = read_tokenizer(metadata)
    assert tokenizer
    tokenizer.write(path)
    return Tokenizer.from_file(str(path))
