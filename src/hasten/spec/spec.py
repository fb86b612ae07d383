"""What a decoder is, block by block, as frozen data.

A Spec holds no code and no arrays. It round-trips through JSON, and carries a schema version so that a file from a newer hasten is
refused instead of misread. Kinds are types: a new kind of mixer, norm or wiring is a new class here, never another flag on an old one.
"""

import math
from typing import Annotated, Any, Literal

import msgspec

from hasten.base.errors import ConfigError, UnsupportedError, one_line

SCHEMA_VERSION = 1

BLOCK_LIMIT = 4096
"""Most blocks of a Spec; ten times what any published model has."""

SIZE_LIMIT = 1 << 24
"""Largest width, vocabulary, context, and so on."""

ROTARY_LIMIT = 1 << 12
"""Most features of a head that may be rotated: each op carries half as many frequencies."""

Size = Annotated[int, msgspec.Meta(ge=1, le=SIZE_LIMIT)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Eps = Annotated[float, msgspec.Meta(ge=0)]

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]
Dtype = Literal["float64", "float32", "bfloat16", "float16"]


def _snake_case(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name))


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=_snake_case, tag_field="kind"):
    """A piece of a Spec. Floats must be finite; subclasses check how their fields fit together in ``_check``."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ConfigError(f"{type(self).__name__}.{name} is {one_line(value)}; a finite number is needed")
        self._check()

    def _check(self) -> None:
        """Raise ConfigError where fields contradict each other."""


# --- norms


class RMSNorm(Part, frozen=True):
    """x / sqrt(mean(x²) + eps) · (offset + weight). Zhang & Sennrich 2019; Gemma adds 1 to the weight."""

    eps: Eps
    offset: float = 0.0


class LayerNorm(Part, frozen=True):
    """(x − mean) / sqrt(var + eps) · weight + bias. Ba et al. 2016."""

    eps: Eps
    bias: bool = True


Norm = RMSNorm | LayerNorm


# --- positions


class LinearScaling(Part, frozen=True):
    """Positions divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: Positive


class Llama3Scaling(Part, frozen=True):
    """Low frequencies divided by ``factor``, high ones kept, a smooth ramp between (Llama 3.1)."""

    factor: Positive
    low_frequency_factor: Positive
    high_frequency_factor: Positive
    original_context: Size


class Yarn(Part, frozen=True):
    """NTK-by-parts interpolation (Peng et al. 2023). ``attention_factor`` multiplies the rotated queries and keys."""

    factor: Positive
    original_context: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive = 1.0


class LongRope(Part, frozen=True):
    """One divisor per frequency, the long set once the context exceeds the original (Ding et al. 2024).

    A Program is lowered for one context, so the choice is made once and holds for every token of every request."""

    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    original_context: Size
    attention_factor: Positive

    def _check(self) -> None:
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(f"LongRope has {len(self.short_factor)} short and {len(self.long_factor)} long factors; they must match")


class PerPair(Part, frozen=True):
    """Every pair's frequency divided by its own of ``divisors``, one a pair: any frequencies, as of pairs picked from another rotation."""

    divisors: tuple[Positive, ...]


Scaling = LinearScaling | Llama3Scaling | Yarn | LongRope | PerPair


class Rotary(Part, frozen=True):
    """Rotary embedding (Su et al. 2021) of ``dims`` features of each head.

    Pairs are (i, i + dims/2), or (2i, 2i + 1) where ``interleaved``."""

    base: Positive
    dims: Annotated[int, msgspec.Meta(ge=1, le=ROTARY_LIMIT)]
    interleaved: bool = False
    scaling: Scaling | None = None

    def _check(self) -> None:
        if self.dims % 2:
            raise ConfigError(f"Rotary.dims is {self.dims}; rotation works on pairs, so an even number is needed")
        if isinstance(self.scaling, LongRope) and len(self.scaling.short_factor) != self.dims // 2:
            raise ConfigError(f"{len(self.scaling.short_factor)} LongRope factors for {self.dims // 2} frequencies; one each is needed")
        if isinstance(self.scaling, PerPair) and len(self.scaling.divisors) != self.dims // 2:
            raise ConfigError(f"{len(self.scaling.divisors)} divisors for {self.dims // 2} frequencies; one each is needed")


class Alibi(Part, frozen=True):
    """slope[h] · (key position − query position) added to the scores (Press et al. 2021)."""

    slopes: tuple[float, ...]


class RelativeSinusoid(Part, frozen=True):
    """Transformer-XL's relative positions (Dai et al. 2019, section 3.3): content bias u, position bias v, projected sinusoids.

    Distances beyond ``clamp`` are treated as ``clamp``."""

    clamp: Size | None = None


Position = Rotary | Alibi | RelativeSinusoid


class LearnedPositions(Part, frozen=True):
    """A table of ``count`` vectors added to the token embeddings; position p uses row p + offset."""

    count: Size
    offset: Count = 0

    def _check(self) -> None:
        if self.offset >= self.count:
            raise ConfigError(f"a table of {self.count} positions has none left behind an offset of {self.offset}")


# --- what a query may see (itself always included)


class Causal(Part, frozen=True):
    """Every earlier position."""


class SlidingWindow(Part, frozen=True):
    """The last ``size`` positions, the query's own among them."""

    size: Size


class SegmentMemory(Part, frozen=True):
    """Positions are cut into segments of ``segment``; a query sees its segment so far and the ``memory`` positions before it."""

    segment: Size
    memory: Count


Visibility = Causal | SlidingWindow | SegmentMemory


# --- mixers


class Attention(Part, frozen=True):
    """Softmax attention: multi-head, grouped or multi-query. Scores are q·k·scale.

    ``norm_span`` says whether q_norm and k_norm run over each head or over the whole projected row; ``clip`` bounds the projections;
    ``sinks`` adds one learned logit per head to the softmax's denominator; ``gate`` multiplies the output by a learned sigmoid."""

    heads: Size
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    scale: Positive
    position: Position | None
    visible: Visibility = Causal()
    bias: bool = False
    out_bias: bool = False
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_span: Literal["head", "row"] = "head"
    softcap: Positive | None = None
    clip: Positive | None = None
    sinks: bool = False
    gate: bool = False

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads; the first must be a multiple")
        if isinstance(self.position, Rotary) and self.position.dims > self.head_dim:
            raise ConfigError(f"rotary dims {self.position.dims} exceed the head dimension {self.head_dim}")
        if isinstance(self.position, Alibi) and len(self.position.slopes) != self.heads:
            raise ConfigError(f"{len(self.position.slopes)} ALiBi slopes for {self.heads} heads; one a head is needed")
        if isinstance(self.position, RelativeSinusoid):
            if self.kv_heads != self.heads or self.value_dim != self.head_dim:
                raise ConfigError("relative sinusoids need as many key/value heads as heads, and values as wide as keys")
            if self.softcap is not None or self.sinks:
                raise ConfigError("relative sinusoids do not go with a softcap or sinks")


class CrossLayerAttention(Part, frozen=True):
    """Attention over the keys and values of block ``source``, an earlier one (Brandon et al. 2024, arXiv:2405.12981): as ``attention``
    says, without keys and values of its own."""

    attention: Attention
    source: Count

    def _check(self) -> None:
        if self.attention.k_norm is not None:
            raise ConfigError("attention over another block's keys has none of its own to normalize; leave k_norm out")
        if isinstance(self.attention.position, RelativeSinusoid):
            raise ConfigError("relative sinusoids do not go with another block's keys")

    def reads(self, other: Attention) -> bool:
        """Are the keys and values of ``other`` of the shape, the positions and the visibility that this reads?"""
        names = ("kv_heads", "head_dim", "value_dim", "position", "visible")
        return all(getattr(self.attention, name) == getattr(other, name) for name in names)


class LatentAttention(Part, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are up-projections of one cached vector per token.

    A head's query is ``nope_dim`` features compared with the latent, then ``rope_dim`` rotated features compared with a shared key.
    ``norm`` is over what is latent, of keys and values and of queries; without one they are read as they are."""

    heads: Size
    q_rank: Size | None
    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    scale: Positive
    rotary: Rotary
    norm: Norm | None
    bias: bool = False

    def _check(self) -> None:
        if self.rotary.dims > self.rope_dim:
            raise ConfigError(f"rotary dims {self.rotary.dims} exceed the {self.rope_dim} rotated features of a head")


class Mamba(Part, frozen=True):
    """Selective state space, one step size per channel (Gu & Dao 2023)."""

    inner: Size
    state: Size
    conv: Size
    dt_rank: Size
    bias: bool = False
    conv_bias: bool = True


class Mamba2(Part, frozen=True):
    """State-space duality: one decay per head, B and C shared by groups (Dao & Gu 2024)."""

    heads: Size
    head_dim: Size
    state: Size
    groups: Size
    conv: Size
    norm: RMSNorm
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 0.0
    dt_max: float | None = None

    def _check(self) -> None:
        if self.heads % self.groups:
            raise ConfigError(f"{self.heads} Mamba-2 heads cannot share {self.groups} groups; the first must be a multiple")


class GatedDeltaNet(Part, frozen=True):
    """Linear attention with a gated delta rule (Yang et al. 2024), as in Qwen3-Next."""

    key_heads: Size
    value_heads: Size
    key_dim: Size
    value_dim: Size
    conv: Size
    norm: RMSNorm

    def _check(self) -> None:
        if self.value_heads % self.key_heads:
            raise ConfigError(f"{self.value_heads} value heads cannot share {self.key_heads} key heads; the first must be a multiple")


class LinearAttention(Part, frozen=True):
    """Linear attention with Hedgehog's learned features (Zhang et al. 2024, arXiv:2402.04347): a state of fixed size in place of keys and
    values. A query weighs a key by φ(A·q) · φ(B·k), with φ(x) = [softmax(x), softmax(−x)], A and B a head's own square matrices.

    Queries and keys come as softmax attention has them: head by head normalized where there are norms, then rotated."""

    heads: Size
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    position: Rotary | None
    bias: bool = False
    out_bias: bool = False
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} linear heads cannot share {self.kv_heads} key/value heads; the first must be a multiple")
        if self.position is not None and self.position.dims > self.head_dim:
            raise ConfigError(f"rotary dims {self.position.dims} exceed the head dimension {self.head_dim}")


Mixer = Attention | CrossLayerAttention | LatentAttention | Mamba | Mamba2 | GatedDeltaNet | LinearAttention


# --- feed-forwards


class ClampedSwiglu(Part, frozen=True):
    """gpt-oss's gate: g = min(g, limit), u = clip(u, ±limit), g · sigmoid(alpha·g) · (u + 1)."""

    alpha: Positive
    limit: Positive


class MLP(Part, frozen=True):
    """down(activation(up(x)))."""

    hidden: Size
    activation: Activation
    bias: bool = False


class GatedMLP(Part, frozen=True):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020)."""

    hidden: Size
    activation: Activation | ClampedSwiglu
    bias: bool = False


class Router(Part, frozen=True):
    """Scores every expert, picks the best.

    ``correction`` is a learned bias used to choose but not to weigh; with ``groups`` > 1 only the ``top_groups`` groups whose two best
    experts score highest compete (DeepSeek-V3). ``normalize`` divides the chosen weights by their sum, ``scale`` multiplies them."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Positive = 1.0
    bias: bool = False
    correction: bool = False
    groups: Size = 1
    top_groups: Size = 1


class MixtureOfExperts(Part, frozen=True):
    """``top_k`` of ``experts`` feed-forwards per token, beside one that always runs where ``shared`` is given."""

    experts: Size
    top_k: Size
    expert: GatedMLP
    router: Router
    shared: GatedMLP | None = None
    shared_gate: bool = False

    def _check(self) -> None:
        if self.shared_gate and self.shared is None:
            raise ConfigError("shared_gate weighs the shared feed-forward, but there is none")
        if self.top_k > self.experts:
            raise ConfigError(f"{self.top_k} experts per token, but the layer has only {self.experts}")
        if self.experts % self.router.groups:
            raise ConfigError(f"{self.experts} experts cannot be split into {self.router.groups} groups")
        if self.router.top_groups > self.router.groups:
            raise ConfigError(f"{self.router.top_groups} groups are to be picked of {self.router.groups}")
        if self.top_k > self.router.top_groups * (self.experts // self.router.groups):
            raise ConfigError(f"{self.top_k} experts per token, but the {self.router.top_groups} chosen groups hold fewer")


FeedForward = MLP | GatedMLP | MixtureOfExperts


# --- wiring: how a block's two branches join the residual stream


class PreNorm(Part, frozen=True):
    """x += mixer(norm(x)); x += feed_forward(norm(x))."""

    mixer: Norm
    feed_forward: Norm | None


class Sandwich(Part, frozen=True):
    """x += post(mixer(pre(x))), and the same for the feed-forward (Gemma 2)."""

    mixer: Norm
    mixer_post: Norm
    feed_forward: Norm
    feed_forward_post: Norm


class BranchNorm(Part, frozen=True):
    """x += norm(mixer(x)); x += norm(feed_forward(x)) (OLMo 2)."""

    mixer_post: Norm
    feed_forward_post: Norm


class PostNorm(Part, frozen=True):
    """x = norm(x + mixer(x)); x = norm(x + feed_forward(x)) (Vaswani et al. 2017)."""

    mixer: Norm
    feed_forward: Norm


class Parallel(Part, frozen=True):
    """x += mixer(norm(x)) + feed_forward(norm(x)); one norm serves both where ``feed_forward`` is absent."""

    mixer: Norm
    feed_forward: Norm | None


Wiring = PreNorm | Sandwich | BranchNorm | PostNorm | Parallel


class LowRank(Part, frozen=True):
    """A matrix as a product of two: the linear layer ``layer`` (as mixer.q, feed_forward.up) reads ``rank`` features of what it read."""

    layer: str
    rank: Size


class Block(Part, frozen=True, omit_defaults=True):
    """One layer. Blocks of a model may differ in every field.

    With ``shares`` the matrices are those of the block of that number, an earlier one; its norms and biases are its own."""

    mixer: Mixer | None
    feed_forward: FeedForward | None
    wiring: Wiring
    shares: Count | None = None
    low_rank: tuple[LowRank, ...] = ()

    def _check(self) -> None:
        if self.mixer is None and self.feed_forward is None:
            raise ConfigError("a block needs a mixer, a feed-forward, or both")
        if len({each.layer for each in self.low_rank}) < len(self.low_rank):
            raise ConfigError(f"low_rank names a layer twice: {one_line([each.layer for each in self.low_rank])}")


# --- ends


class Embedding(Part, frozen=True):
    """Token table, multiplied by ``scale``; positions are added and ``norm`` applied where given."""

    scale: Positive = 1.0
    positions: LearnedPositions | None = None
    norm: Norm | None = None


class Head(Part, frozen=True):
    """Hidden state to logits; ``tied`` reads the embedding table."""

    tied: bool
    bias: bool = False
    softcap: Positive | None = None
    scale: Positive = 1.0


class Exit(Part, frozen=True):
    """An early exit after block ``after`` (0-based): its own norm, then its own head."""

    after: Count
    norm: Norm
    head: Head


class Spec(Part, frozen=True, kw_only=True):
    """A whole decoder. ``context`` is the longest sequence it was made for, in tokens."""

    schema_version: int = SCHEMA_VERSION
    vocab: Size
    width: Size
    context: Size
    embedding: Embedding
    blocks: Annotated[tuple[Block, ...], msgspec.Meta(max_length=BLOCK_LIMIT)]
    norm: Norm | None
    head: Head
    exits: tuple[Exit, ...] = ()
    residual: Dtype = "float32"

    def _check(self) -> None:
        if self.schema_version > SCHEMA_VERSION:
            raise UnsupportedError(
                f"schema_version {self.schema_version} is newer than this hasten reads ({SCHEMA_VERSION}); upgrade hasten to load it"
            )
        if not self.blocks:
            raise ConfigError("a Spec needs at least one block")
        relative = any(isinstance(b.mixer, Attention) and isinstance(b.mixer.position, RelativeSinusoid) for b in self.blocks)
        if relative and self.width % 2:
            raise ConfigError(f"width {self.width} is odd; relative sinusoids come in pairs of sine and cosine")
        for index, block in enumerate(self.blocks):
            if isinstance(block.mixer, CrossLayerAttention):
                self._check_source(index, block.mixer)
            if block.shares is not None:
                self._check_shared(index, block, block.shares)
        for early in self.exits:
            if early.after >= len(self.blocks) - 1:
                raise ConfigError(f"an exit after block {early.after} is not early in a model of {len(self.blocks)} blocks")

    def _check_source(self, index: int, mixer: CrossLayerAttention) -> None:
        other = self.blocks[mixer.source].mixer if mixer.source < index else None
        if not isinstance(other, Attention) or not mixer.reads(other):
            raise ConfigError(
                f"block {index} reads keys and values of block {mixer.source}, which is no earlier one with keys and values of that shape, "
                f"position and visibility"
            )

    def _check_shared(self, index: int, block: Block, other: int) -> None:
        if other >= index or self.blocks[other].shares is not None:
            raise ConfigError(f"block {index} shares the weights of block {other}; one before it is needed that has its own")
        owner = self.blocks[other]
        if (owner.mixer, owner.feed_forward, owner.low_rank) != (block.mixer, block.feed_forward, block.low_rank):
            raise ConfigError(f"block {index} shares the weights of block {other}, which has other parts")

    def to_json(self) -> bytes:
        """This Spec as indented UTF-8 JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    @classmethod
    def from_json(cls, text: bytes | str) -> "Spec":
        """Read what ``to_json`` wrote. Raises ConfigError on anything else, UnsupportedError on a newer schema."""
        return cls.from_data(parse_json(text, "Spec"))

    @classmethod
    def from_data(cls, data: Any) -> "Spec":
        """Build from parsed JSON, checking every field's type and range."""
        if isinstance(data, dict) and isinstance(data.get("schema_version"), int) and data["schema_version"] > SCHEMA_VERSION:
            raise UnsupportedError(
                f"schema_version {one_line(data['schema_version'])} is newer than this hasten reads ({SCHEMA_VERSION}); "
                f"upgrade hasten to load it"
            )
        try:
            return msgspec.convert(data, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise ConfigError(f"Spec: {error}".replace("\n", " ")) from None

    def checked(self) -> "Spec":
        """This Spec with every field's declared range enforced, which constructors alone do not do."""
        return Spec.from_data(msgspec.to_builtins(self))


def parse_json(text: bytes | str, what: str) -> Any:
    """Parse strict JSON (no NaN), turning every failure into a ConfigError that begins with ``what``."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{what}: not valid JSON: {error}".replace("\n", " ")) from None
