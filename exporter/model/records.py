"""What a model is made of. Everything below a family's own file dispatches on these records, and on no family's name. No torch.

A layer is a mixer, in which a token reads others, and an ffn, in which it is alone. Both are branches that add to the residual stream.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

HeadNorm = Literal["weighted", "plain"]  # RMSNorm over each head: with a weight of the head's size, or with none
Activation = Literal["gelu_tanh", "silu"]


@dataclass(frozen=True)
class Yarn:
    """A context that was lengthened by YaRN (arXiv:2309.00071): only pairs that turn slowly are slowed by the rope's factor.

    context: positions before. Pairs with `fast` turns or more in it keep their speed, those with `slow` or fewer take all of the factor,
    between the two it changes evenly from pair to pair. magnitude: of the turned queries and of the turned keys.
    """

    context: int
    fast: float
    slow: float
    magnitude: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: pair d of a head turns by position * base^(-2d / size) / factor, over the tensor `divisors` where one is named.

    name: of the table of frequencies, which layers share. size: the dimensions that turn, the first of a head.
    neighbours: the pairs are (2d, 2d + 1), as the rows of Q and K of a llama file; otherwise (d, d + size / 2).
    """

    name: str
    base: float
    size: int
    factor: float = 1.0
    divisors: str | None = None
    neighbours: bool = False
    yarn: Yarn | None = None

    @property
    def scores(self) -> float:
        """What scores grow by where a whole head turns."""
        return self.yarn.magnitude**2 if self.yarn else 1.0

    @property
    def constant(self) -> str:
        return f"rope_inv_freq_{self.name}" if self.name else "rope_inv_freq"


@dataclass(frozen=True)
class Attention:
    """Softmax attention. window: keys that a query sees, its own among them; None: all before it. scale: of the scores.

    value: "key" where V is the raw K. kv_from: the earlier layer whose keys and values it reads in place of its own.
    gated: the output is multiplied by the sigmoid of a gate that comes with the query.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None
    scale: float = 1.0
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    v_norm: HeadNorm | None = None
    value: Literal["own", "key"] = "own"
    kv_from: int | None = None
    gated: bool = False

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta rule: a state [value_heads, key_dim, value_dim] and the last `taps` - 1 inputs of a causal convolution.

    Value head v takes the key and query of head v mod key_heads. The head's output is normed with a weight, then gated by SiLU.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_size

    @property
    def token_flops(self) -> int:
        """Of one token: the convolution; the state's decay, what it says of the key, its change, what it says of the query."""
        return 2 * self.taps * self.channels + 7 * self.value_heads * self.key_dim * self.value_dim


    @property
    def token_scratch(self) -> int:
        """Bytes of a token of many: its heads, what a block of 32 makes of them, its outputs, its share of the state before the block."""
        keys, rows = 2 * self.key_heads * self.key_dim, self.key_dim + 3 * self.value_dim + 64
        return 4 * (keys + self.value_heads * (rows + self.key_dim * self.value_dim // 32))


@dataclass(frozen=True)
class Dense:
    """down(activation(gate) * up)."""

    size: int
    activation: Activation

    @property
    def width(self) -> int:
        """Inner sizes that one token meets."""
        return self.size


@dataclass(frozen=True)
class Experts:
    """`used` of `count` networks of inner size `size`, chosen for each token by a router; their weights sum to 1 where `renormalized`.

    shared: a network that every token takes beside them; shared_gated: by the sigmoid of a gate. branch_norms: both have their own norms.
    own_input: experts and router read the residual stream, each normed for itself, the router's without a weight, times a vector and
    1 / sqrt(hidden size); otherwise both read what the layer's norm gives. scaled: an expert's output is multiplied by a scalar of its own.
    """

    count: int
    used: int
    size: int
    activation: Activation
    shared: Dense | None = None
    shared_gated: bool = False
    branch_norms: bool = False
    renormalized: bool = True
    own_input: bool = False
    scaled: bool = False

    @property
    def width(self) -> int:
        return self.used * self.size + (self.shared.size if self.shared else 0)


@dataclass(frozen=True)
class Layer:
    """post_norms: a branch is normed before it is added. scaled: the residual stream is multiplied by a scalar at the layer's end."""

    index: int
    mixer: Attention | DeltaNet
    ffn: Dense | Experts
    post_norms: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class PerLayerEmbedding:
    """A second embedding of each token: `size` values for each layer, which a third branch of the layer multiplies with its gate.

    They are (scale * row of a table + RMSNorm(projection_scale * P x)) * sum_scale, x the first embedding as the first layer gets it. The
    branch is W2(activation(W1 x) * values), normed, x the residual stream after the ffn.
    """

    size: int
    activation: Activation
    scale: float
    projection_scale: float
    sum_scale: float


@dataclass(frozen=True)
class ModelConfig:
    """A model. tied_head: the output matrix is the embedding. final_logit_softcapping: 0 where logits are as they are.

    draft_blocks: blocks behind the layers that predict further tokens, which are no layers.
    """

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    context_length: int
    layers: tuple[Layer, ...]
    tied_head: bool
    embedding_scale: float = 1.0
    final_logit_softcapping: float = 0.0
    per_layer_embedding: PerLayerEmbedding | None = None
    suppress_tokens: tuple[int, ...] = ()
    draft_blocks: int = 0

    @property
    def attentions(self) -> dict[int, Attention]:
        """By layer."""
        return {layer.index: layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)}

    @property
    def ropes(self) -> dict[str, Rope]:
        """By the name of the constant, the tables of frequencies."""
        return {mixer.rope.constant: mixer.rope for mixer in self.attentions.values()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class DraftConfig(ModelConfig):
    """A model that drafts for another one: every layer reads the keys and values of that one's layer `kv_from`. It has none of its own.

    target_hidden: the other's hidden size. Its rows come in, beside its embedding of a token, and what goes out takes their place.
    """

    target_hidden: int = 0


@dataclass(frozen=True)
class CacheSpec:
    """What a layer keeps of earlier tokens. readers: the layers that read it, its own first.

    kind: "ring", a slot for each of the newest `window` positions; "global", one for every position; "state", which each token replaces
    and nothing steps back further than by the step just made. parts: what a state is made of, name and shape; float32.
    """

    layer: int
    kind: Literal["ring", "global", "state"]
    heads: int
    head_dim: int
    window: int | None
    readers: tuple[int, ...] = field(default=())
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()


def cache_specs(config: ModelConfig) -> tuple[CacheSpec, ...]:
    attentions, found = config.attentions, []
    for layer in config.layers:
        i, mixer = layer.index, layer.mixer
        if isinstance(mixer, DeltaNet):
            parts = (("conv", (mixer.taps - 1, mixer.channels)), ("delta", (mixer.value_heads, mixer.key_dim, mixer.value_dim)))
            found.append(CacheSpec(i, "state", mixer.value_heads, mixer.value_dim, None, (i,), parts))
        elif mixer.kv_from is None:
            readers = (i, *(j for j, other in attentions.items() if other.kv_from == i))
            found.append(CacheSpec(i, "ring" if mixer.window else "global", mixer.kv_heads, mixer.head_dim, mixer.window, readers))
    return tuple(found)
