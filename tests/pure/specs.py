"""Small Specs of every kind, by hand and at random. Shared by the tests of Spec, lowering and Program."""

from hypothesis import strategies as st

from hasten.spec import (
    MLP,
    Alibi,
    Attention,
    Block,
    BranchNorm,
    Causal,
    ClampedSwiglu,
    CrossLayerAttention,
    Embedding,
    Exit,
    GatedDeltaNet,
    GatedMLP,
    Head,
    LatentAttention,
    LayerNorm,
    LearnedPositions,
    LinearAttention,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Mamba,
    Mamba2,
    MixtureOfExperts,
    Parallel,
    PerPair,
    PostNorm,
    PreNorm,
    RelativeSinusoid,
    RMSNorm,
    Rotary,
    Router,
    Sandwich,
    SegmentMemory,
    SlidingWindow,
    Spec,
    Yarn,
)

RMS = RMSNorm(eps=1e-6)
LAYER = LayerNorm(eps=1e-5)
ROPE = Rotary(base=10000.0, dims=4)


def attention(**fields):
    return Attention(**{"heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 4, "scale": 0.5, "position": ROPE} | fields)


def moe(router=None, **fields):
    expert = GatedMLP(hidden=6, activation="silu")
    return MixtureOfExperts(**{"experts": 4, "top_k": 2, "expert": expert, "router": router or Router()} | fields)


MIXERS = {
    "gqa": attention(),
    "window": attention(visible=SlidingWindow(size=3)),
    "alibi": attention(position=Alibi(slopes=(0.5, 0.25, 0.125, 0.0625)), bias=True, out_bias=True, clip=0.7),
    "no-position": attention(position=None, value_dim=3, softcap=5.0),
    "norms": attention(q_norm=RMS, k_norm=RMSNorm(eps=1e-6, offset=1.0), sinks=True, gate=True),
    "row-norms": attention(q_norm=LAYER, k_norm=LAYER, norm_span="row"),
    "relative": attention(kv_heads=4, position=RelativeSinusoid(clamp=5), visible=SegmentMemory(segment=4, memory=2)),
    "latent": LatentAttention(heads=2, q_rank=5, kv_rank=6, nope_dim=3, rope_dim=4, value_dim=3, scale=0.4, rotary=ROPE, norm=RMS),
    "latent-full-q": LatentAttention(
        heads=2, q_rank=None, kv_rank=6, nope_dim=3, rope_dim=4, value_dim=3, scale=0.4, rotary=ROPE, norm=RMS
    ),
    "latent-plain": LatentAttention(
        heads=2,
        q_rank=5,
        kv_rank=6,
        nope_dim=3,
        rope_dim=4,
        value_dim=3,
        scale=0.4,
        norm=None,
        rotary=Rotary(base=100.0, dims=4, scaling=PerPair(divisors=(1.0, 0.5))),
    ),
    "mamba": Mamba(inner=10, state=3, conv=4, dt_rank=2),
    "mamba2": Mamba2(heads=4, head_dim=3, state=2, groups=2, conv=3, norm=RMS, dt_min=0.001, dt_max=0.5),
    "linear": LinearAttention(heads=4, kv_heads=2, head_dim=4, value_dim=3, position=ROPE),
    "linear-norms": LinearAttention(
        heads=4, kv_heads=4, head_dim=3, value_dim=2, position=None, bias=True, out_bias=True, q_norm=RMS, k_norm=LAYER
    ),
    "delta": GatedDeltaNet(key_heads=2, value_heads=4, key_dim=3, value_dim=2, conv=3, norm=RMS),
}

FEED_FORWARDS = {
    "mlp": MLP(hidden=10, activation="gelu_tanh", bias=True),
    "gated": GatedMLP(hidden=10, activation="silu"),
    "clamped": GatedMLP(hidden=10, activation=ClampedSwiglu(alpha=1.702, limit=7.0), bias=True),
    "moe": moe(),
    "moe-shared": moe(shared=GatedMLP(hidden=5, activation="gelu"), shared_gate=True),
    "moe-groups": moe(
        Router(score="sigmoid", correction=True, groups=2, top_groups=1, scale=2.5, bias=True), shared=GatedMLP(hidden=5, activation="silu")
    ),
    "none": None,
}

WIRINGS = {
    "pre": PreNorm(mixer=RMS, feed_forward=RMS),
    "sandwich": Sandwich(mixer=RMS, mixer_post=RMS, feed_forward=RMS, feed_forward_post=RMS),
    "branch": BranchNorm(mixer_post=RMS, feed_forward_post=RMS),
    "post": PostNorm(mixer=LAYER, feed_forward=LAYER),
    "parallel": Parallel(mixer=LAYER, feed_forward=None),
    "parallel-two-norms": Parallel(mixer=LAYER, feed_forward=LayerNorm(eps=1e-5, bias=False)),
}


def block(mixer="gqa", feed_forward="gated", wiring="pre"):
    """A block of parts by their names above, or of the parts themselves."""
    return Block(
        mixer=MIXERS[mixer] if isinstance(mixer, str) else mixer,
        feed_forward=FEED_FORWARDS[feed_forward] if isinstance(feed_forward, str) else feed_forward,
        wiring=WIRINGS[wiring] if isinstance(wiring, str) else wiring,
    )


def spec_of(*blocks, **fields):
    """A Spec of these blocks: vocabulary 11, width 8, context 16."""
    settings = {"vocab": 11, "width": 8, "context": 16, "embedding": Embedding(), "norm": RMS, "head": Head(tied=False)}
    return Spec(**settings | {"blocks": blocks or (block(), block())} | fields)


SPECS = {
    **{f"mixer-{name}": spec_of(block(mixer=name), block(mixer=name)) for name in MIXERS},
    **{f"feed-forward-{name}": spec_of(block(feed_forward=name)) for name in FEED_FORWARDS},
    **{f"wiring-{name}": spec_of(block(wiring=name), block("mamba", "mlp", name)) for name in WIRINGS},
    "no-mixer": spec_of(block(mixer=None), block(feed_forward=None, wiring=PreNorm(mixer=RMS, feed_forward=None))),
    "mixed": spec_of(block("window"), block("latent", "moe-shared", "sandwich"), block("mamba2", "none"), block("delta", "mlp", "branch")),
    "ends": spec_of(
        embedding=Embedding(scale=2.5, positions=LearnedPositions(count=20, offset=2), norm=LAYER), norm=None,
        head=Head(tied=True, softcap=3.0, scale=0.25, bias=True),
    ),
    "cross-layer": spec_of(
        block(), block(CrossLayerAttention(attention=attention(heads=6, bias=True, q_norm=RMS), source=0)), block("window"),
        block(CrossLayerAttention(attention=attention(heads=2, sinks=True, gate=True), source=0)),
    ),
    "exits": spec_of(
        block(), block("mamba"), block("window"),
        exits=(Exit(after=0, norm=RMS, head=Head(tied=True, softcap=2.0)), Exit(after=1, norm=LAYER, head=Head(tied=False, scale=2.0))),
    ),
}  # fmt: skip


# --- at random


def floats(low=1e-6, high=1e6):
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def sizes(high=64):
    return st.integers(1, high)


def structs(kind, **fields):
    return st.builds(kind, **fields)


def maybe(strategy):
    return st.none() | strategy


ACTIVATIONS = st.sampled_from(["relu", "relu_squared", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
RMS_NORMS = structs(RMSNorm, eps=floats(0, 1), offset=floats(-2, 2))
NORMS = RMS_NORMS | structs(LayerNorm, eps=floats(0, 1), bias=st.booleans())
SCALINGS = (
    structs(LinearScaling, factor=floats())
    | structs(Llama3Scaling, factor=floats(), low_frequency_factor=floats(), high_frequency_factor=floats(), original_context=sizes())
    | structs(
        Yarn, factor=floats(), original_context=sizes(), beta_fast=floats(), beta_slow=floats(), truncate=st.booleans(),
        attention_factor=floats(),
    )
)  # fmt: skip
VISIBILITIES = structs(Causal) | structs(SlidingWindow, size=sizes()) | structs(SegmentMemory, segment=sizes(), memory=st.integers(0, 64))


@st.composite
def rotaries(draw, head_dim):
    half = draw(st.integers(1, head_dim // 2))
    factors = st.tuples(*[floats()] * half)
    long = structs(LongRope, short_factor=factors, long_factor=factors, original_context=sizes(), attention_factor=floats())
    scalings = maybe(SCALINGS | long | structs(PerPair, divisors=factors))
    return draw(structs(Rotary, base=floats(1.5), dims=st.just(2 * half), interleaved=st.booleans(), scaling=scalings))


@st.composite
def attentions(draw):
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(2, 16))
    heads = kv_heads * draw(st.integers(1, 3))
    position = draw(
        maybe(rotaries(head_dim) | structs(Alibi, slopes=st.tuples(*[floats()] * heads)) | structs(RelativeSinusoid, clamp=maybe(sizes())))
    )
    relative = isinstance(position, RelativeSinusoid)
    heads = kv_heads if relative else heads
    return draw(
        structs(
            Attention, heads=st.just(heads), kv_heads=st.just(kv_heads), head_dim=st.just(head_dim), scale=floats(),
            value_dim=st.just(head_dim) if relative else sizes(), position=st.just(position),
            visible=VISIBILITIES, bias=st.booleans(), out_bias=st.booleans(), q_norm=maybe(NORMS),
            k_norm=maybe(NORMS), norm_span=st.sampled_from(["head", "row"]), softcap=st.none() if relative else maybe(floats()),
            clip=maybe(floats()), sinks=st.just(False) if relative else st.booleans(), gate=st.booleans(),
        )
    )  # fmt: skip


MAMBAS = structs(
    Mamba, inner=sizes(), state=sizes(), conv=sizes(8), dt_rank=sizes(), bias=st.booleans(), conv_bias=st.booleans()
) | st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda pair: structs(
        Mamba2, heads=st.just(pair[0] * pair[1]), head_dim=sizes(), state=sizes(), groups=st.just(pair[1]), conv=sizes(8), norm=RMS_NORMS,
        dt_min=floats(0, 1), dt_max=maybe(floats()),
    )
)  # fmt: skip
LATENTS = structs(
    LatentAttention, heads=sizes(), q_rank=maybe(sizes()), kv_rank=sizes(), nope_dim=sizes(), rope_dim=st.just(4), value_dim=sizes(),
    scale=floats(), rotary=rotaries(4), norm=maybe(NORMS), bias=st.booleans(),
)  # fmt: skip
DELTAS = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda pair: structs(
        GatedDeltaNet, key_heads=st.just(pair[1]), value_heads=st.just(pair[0] * pair[1]), key_dim=sizes(), value_dim=sizes(),
        conv=sizes(8), norm=RMS_NORMS,
    )
)  # fmt: skip


@st.composite
def linear_attentions(draw):
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(2, 16))
    return draw(
        structs(
            LinearAttention, heads=st.integers(1, 3).map(lambda shared: kv_heads * shared), kv_heads=st.just(kv_heads),
            head_dim=st.just(head_dim), value_dim=sizes(), position=maybe(rotaries(head_dim)), bias=st.booleans(), out_bias=st.booleans(),
            q_norm=maybe(NORMS), k_norm=maybe(NORMS),
        )
    )  # fmt: skip


MLPS = structs(MLP, hidden=sizes(), activation=ACTIVATIONS, bias=st.booleans())
GATED = structs(
    GatedMLP, hidden=sizes(), activation=ACTIVATIONS | structs(ClampedSwiglu, alpha=floats(), limit=floats()), bias=st.booleans()
)


@st.composite
def mixtures(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, groups))
    router = structs(
        Router, score=st.sampled_from(["softmax", "sigmoid"]), normalize=st.booleans(), scale=floats(), bias=st.booleans(),
        correction=st.booleans(), groups=st.just(groups), top_groups=st.just(top_groups),
    )  # fmt: skip
    shared = draw(maybe(GATED))
    return draw(
        structs(
            MixtureOfExperts, experts=st.just(groups * size), top_k=st.integers(1, top_groups * size), expert=GATED, router=router,
            shared=st.just(shared), shared_gate=st.just(False) if shared is None else st.booleans(),
        )
    )  # fmt: skip


WIRED = (
    structs(PreNorm, mixer=NORMS, feed_forward=maybe(NORMS))
    | structs(Sandwich, mixer=NORMS, mixer_post=NORMS, feed_forward=NORMS, feed_forward_post=NORMS)
    | structs(BranchNorm, mixer_post=NORMS, feed_forward_post=NORMS)
    | structs(PostNorm, mixer=NORMS, feed_forward=NORMS)
    | structs(Parallel, mixer=NORMS, feed_forward=maybe(NORMS))
)
FED = MLPS | GATED | mixtures()
BLOCKS = structs(
    Block, mixer=attentions() | LATENTS | MAMBAS | DELTAS | linear_attentions(), feed_forward=maybe(FED), wiring=WIRED
) | structs(Block, mixer=st.none(), feed_forward=FED, wiring=WIRED)
HEADS = structs(Head, tied=st.booleans(), bias=st.booleans(), softcap=maybe(floats()), scale=floats())


@st.composite
def specs(draw):
    """A random Spec, valid in every field."""
    blocks = tuple(draw(st.lists(BLOCKS, min_size=1, max_size=3)))
    exits = ()
    if len(blocks) > 1:
        one = structs(Exit, after=st.integers(0, len(blocks) - 2), norm=NORMS, head=HEADS)
        exits = tuple(draw(st.lists(one, max_size=2)))
    embedding = structs(
        Embedding,
        scale=floats(),
        positions=maybe(structs(LearnedPositions, count=st.integers(5, 64), offset=st.integers(0, 4))),
        norm=maybe(NORMS),
    )
    return draw(
        structs(
            Spec, vocab=sizes(), width=sizes(32).map(lambda n: 2 * n), context=sizes(), embedding=embedding,
            blocks=st.just(blocks), norm=maybe(NORMS), head=HEADS, exits=st.just(exits),
            residual=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
        )
    )  # fmt: skip
