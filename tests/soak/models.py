"""Small random models whose sizes fit nothing: one for each kind of attention and feed-forward the determinism contract speaks of."""

import ml_dtypes
import numpy as np

from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import lower
from hasten.spec import (
    Attention,
    Block,
    Embedding,
    GatedMLP,
    Head,
    MixtureOfExperts,
    PreNorm,
    RMSNorm,
    Rotary,
    Router,
    SlidingWindow,
    Spec,
)

VOCAB, WIDTH, CONTEXT, WINDOW = 301, 136, 192, 23
NORM = RMSNorm(eps=1e-6)
DENSE = GatedMLP(hidden=148, activation="silu")
EXPERTS = MixtureOfExperts(experts=7, top_k=2, expert=GatedMLP(hidden=52, activation="silu"), router=Router())


def attention(kv_heads, **fields):
    return Attention(
        heads=6, kv_heads=kv_heads, head_dim=20, value_dim=20, scale=20**-0.5, position=Rotary(base=10000.0, dims=12), **fields
    )  # fmt: skip


PARTS = {
    "grouped-query": (attention(2), DENSE),
    "multi-query": (attention(1), DENSE),
    "window": (attention(2, visible=SlidingWindow(size=WINDOW)), DENSE),
    "MoE": (attention(3), EXPERTS),
}


def model_of(kind: str, seed: int = 11) -> Model:
    """Two blocks of ``kind`` with bf16 weights drawn from ``seed``, large enough that a token depends on what came before."""
    mixer, feed_forward = PARTS[kind]
    block = Block(mixer=mixer, feed_forward=feed_forward, wiring=PreNorm(mixer=NORM, feed_forward=NORM))
    spec = Spec(
        vocab=VOCAB, width=WIDTH, context=CONTEXT, embedding=Embedding(), blocks=(block, block), norm=NORM, head=Head(tied=False)
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in lower(spec).params.items():
        spread, centre = (0.1, 1.0) if name.endswith("norm.weight") else (2 * shape[-1] ** -0.5, 0.0)
        array = (rng.standard_normal(shape) * spread + centre).astype(ml_dtypes.bfloat16)
        weights[name] = Weight(array.shape, array.dtype, lambda array=array: array)
    return Model(name=f"random {kind}", spec=spec, weights=Weights(weights))
