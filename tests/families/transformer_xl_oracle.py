"""Transformer-XL read once more, straight from its equations, in NumPy float64: the judge of every faster reading.

Source: Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", 2019, arXiv:1901.02860, section 3.3.
For layer n, segment tau, head by head, with m the memory of the layer below and h~ = [SG(m) ; h]:

    q = W_q h        k = W_k,E h~        v = W_v h~
    A[i, j] = q_i . k_j  +  q_i . W_k,R R(i-j)  +  u . k_j  +  w . W_k,R R(i-j)      (w is the paper's second bias, its letter v)
    a = masked-softmax(A / sqrt(d_head)) v
    o = LayerNorm(Linear(a) + h)
    h' = LayerNorm(o + W_2 relu(W_1 o + b_1) + b_2)

Names of tensors and configuration keys are those of Hugging Face's retired TransfoXLLMHeadModel (transformers <= 4.35), as it writes
them to safetensors: shared tensors once, under their first name. Supported is one embedding layer and a plain softmax: ``cutoffs=[]``,
``div_val=1``, ``d_embed == d_model``.

What the paper leaves open is read as that class has it, and was checked against it, in float64, to 1e-12:

- A query at absolute position p, in the segment that begins at s = p - p % L, sees the keys max(0, s - M) <= k <= p: the whole memory
  and its own segment up to itself. ``same_length`` narrows this to the last M keys, its own among them, k > p - M, whatever L is.
  The distance of a key is p - k, so its own key has distance 0.
- ``clamp_len`` > 0 puts min(p - k, clamp_len) in the place of the distance; zero or less means no clamp.
- R(d) is [sin(d f) ; cos(d f)], two halves, f_c = 10000^(-2c/d_model); W_k,R takes it as it is, without a scale.
- Embeddings are multiplied by sqrt(d_model), also where their matrix doubles as the output's; positions are not added to them.
- Projections of attention have no bias; u and w do their part. Feed-forward and logits have one each.
- ``pre_lnorm`` normalises what enters attention (memory included, which is kept as it was before the norm) and what enters the
  feed-forward; residuals pass by; no norm follows the last layer.
- The memory of a layer is its input, not its output, so the last layer's output is never kept.
- Here the memory is empty at first, as in the paper and its PyTorch code. The Hugging Face class begins with M vectors of zero, which
  take part in the softmax (their keys k = -M .. -1 are seen under the rule above without its max(0, ..)): ``zero_memory=True``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def transformer_xl_logits(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    token_ids: Sequence[int],
    segment: int,
    memory: int,
    *,
    zero_memory: bool = False,
) -> Array:
    """Logits [T, V] of every token, float64, before softmax; ``segment`` is L and ``memory`` is M, in tokens.

    ``config["mem_len"]`` is not looked at. Raises ValueError for a configuration outside what this module reads, and for
    ``same_length`` without memory, which lets a query see no key at all.
    """
    check(config)
    if segment < 1 or memory < 0 or (config["same_length"] and memory < 1):
        raise ValueError(f"segment is {segment} and memory {memory}; accepted: segment from 1, memory from 0, from 1 with same_length")
    layers = range(config["n_layer"])
    empty = np.zeros((memory if zero_memory else 0, config["d_model"]))
    memories = [empty for _ in layers]
    logits = []
    for begin in range(0, len(token_ids), segment):
        h = embed(weights, config, token_ids[begin : begin + segment])
        inputs = []
        for layer in layers:
            inputs.append(h)
            h = block(weights, config, layer, h, memories[layer], memory)
        memories = [last(np.concatenate([memories[layer], inputs[layer]]), memory) for layer in layers]
        logits.append(h @ output_matrix(weights, config).T + tensor(weights, "crit.out_layers.0.bias"))
    return np.concatenate(logits) if logits else np.zeros((0, config["vocab_size"]))


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError for what this module does not read."""
    fixed = {"cutoffs": [], "div_val": 1, "d_embed": config["d_model"]}
    for key, accepted in fixed.items():
        if config.get(key, accepted) != accepted:
            raise ValueError(f"config {key} is {config[key]!r}; accepted here: {accepted!r}")
    if config["d_model"] % 2:
        raise ValueError(f"config d_model is {config['d_model']}; accepted: an even number, for its sines and cosines")
    if config.get("attn_type", 0) != 0:
        raise ValueError(f"config attn_type is {config['attn_type']!r}; accepted: 0, relative positions")


def tensor(weights: Mapping[str, np.ndarray], name: str) -> Array:
    return np.asarray(weights[name], dtype=np.float64)


def embed(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], token_ids: Sequence[int]) -> Array:
    """Embeddings [L, d_model] of one segment."""
    matrix = tensor(weights, "transformer.word_emb.emb_layers.0.weight")
    return np.stack([matrix[token] * np.sqrt(config["d_model"]) for token in token_ids])


def output_matrix(weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Array:
    """The matrix [V, d_model] that makes logits."""
    tied = config.get("tie_word_embeddings", True)
    return tensor(weights, "transformer.word_emb.emb_layers.0.weight" if tied else "crit.out_layers.0.weight")


def block(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], layer: int, h: Array, m: Array, memory: int) -> Array:
    """One layer: ``h`` [L, d_model] and its memory ``m`` [at most M, d_model] to [L, d_model]."""
    name = f"transformer.layers.{layer}"
    if config["pre_lnorm"]:
        both = norm(weights, config, f"{name}.dec_attn.layer_norm", np.concatenate([m, h]))
        o = h + attention(weights, config, layer, both[len(m) :], both, memory)
        return o + feed_forward(weights, layer, norm(weights, config, f"{name}.pos_ff.layer_norm", o))
    o = norm(weights, config, f"{name}.dec_attn.layer_norm", h + attention(weights, config, layer, h, np.concatenate([m, h]), memory))
    return norm(weights, config, f"{name}.pos_ff.layer_norm", o + feed_forward(weights, layer, o))


def norm(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], name: str, x: Array) -> Array:
    rows = []
    for row in x:
        mean = row.mean()
        variance = ((row - mean) ** 2).mean()
        rows.append((row - mean) / np.sqrt(variance + config.get("layer_norm_epsilon", 1e-5)))
    return np.reshape(rows, x.shape) * tensor(weights, f"{name}.weight") + tensor(weights, f"{name}.bias")


def feed_forward(weights: Mapping[str, np.ndarray], layer: int, x: Array) -> Array:
    name = f"transformer.layers.{layer}.pos_ff.CoreNet"
    inner = x @ tensor(weights, f"{name}.0.weight").T + tensor(weights, f"{name}.0.bias")
    return np.maximum(inner, 0) @ tensor(weights, f"{name}.3.weight").T + tensor(weights, f"{name}.3.bias")


def attention(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], layer: int, x: Array, context: Array, memory: int) -> Array:
    """``x`` [L, d_model] attends over ``context`` [m + L, d_model], of which it is the end; [L, d_model], residual not added."""
    name = f"transformer.layers.{layer}.dec_attn"
    _, _, w_v = projections(weights, config, layer)
    heads = []
    for head, a in enumerate(attention_probabilities(weights, config, layer, x, context, memory)):
        heads.append(a @ (context @ w_v[head].T))
    return np.concatenate(heads, axis=1) @ tensor(weights, f"{name}.o_net.weight").T


def attention_probabilities(
    weights: Mapping[str, np.ndarray], config: Mapping[str, Any], layer: int, x: Array, context: Array, memory: int
) -> Array:
    """Probabilities [n_head, L, m + L]: each row sums to one, zero where the query does not see the key."""
    n_head, d_head = config["n_head"], config["d_head"]
    w_q, w_k, _ = projections(weights, config, layer)
    w_r = tensor(weights, f"transformer.layers.{layer}.dec_attn.r_net.weight").reshape(n_head, d_head, -1)
    u, w = bias(weights, config, layer, "r_w_bias"), bias(weights, config, layer, "r_r_bias")
    a = np.zeros((n_head, len(x), len(context)))
    for head in range(n_head):
        for i in range(len(x)):
            position = len(context) - len(x) + i
            scores = {}
            for j in range(len(context)):
                distance = position - j
                if distance < 0 or (config["same_length"] and distance >= memory):
                    continue
                q = w_q[head] @ x[i]
                k = w_k[head] @ context[j]
                r = w_r[head] @ sinusoid(config, distance)
                scores[j] = (q @ k + q @ r + u[head] @ k + w[head] @ r) / np.sqrt(d_head)
            largest = max(scores.values())
            total = sum(np.exp(score - largest) for score in scores.values())
            for j, score in scores.items():
                a[head, i, j] = np.exp(score - largest) / total
    return a


def projections(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], layer: int) -> tuple[Array, Array, Array]:
    """W_q, W_k,E and W_v, each [n_head, d_head, d_model]: the three thirds of one matrix, each with its heads one after the other."""
    packed = tensor(weights, f"transformer.layers.{layer}.dec_attn.qkv_net.weight")
    q, k, v = packed.reshape(3, config["n_head"], config["d_head"], config["d_model"])
    return q, k, v


def bias(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], layer: int, name: str) -> Array:
    """u (``r_w_bias``, met by the key's content) or w (``r_r_bias``, met by its distance), [n_head, d_head]."""
    owner = f"transformer.layers.{layer}.dec_attn" if config["untie_r"] else "transformer"
    return tensor(weights, f"{owner}.{name}")


def sinusoid(config: Mapping[str, Any], distance: int) -> Array:
    """R [d_model] of one distance, counted in tokens back from the query."""
    if config["clamp_len"] > 0:
        distance = min(distance, config["clamp_len"])
    frequencies = [10000 ** (-2 * c / config["d_model"]) for c in range(config["d_model"] // 2)]
    return np.array([np.sin(distance * f) for f in frequencies] + [np.cos(distance * f) for f in frequencies])


def last(x: Array, count: int) -> Array:
    return x[max(0, len(x) - count) :]


TINY: Mapping[str, Any] = {
    "model_type": "transfo-xl",
    "architectures": ["TransfoXLLMHeadModel"],
    "vocab_size": 23,
    "d_model": 12,
    "d_embed": 12,
    "n_head": 3,
    "d_head": 5,
    "d_inner": 17,
    "n_layer": 3,
    "mem_len": 6,
    "clamp_len": -1,
    "same_length": False,
    "untie_r": True,
    "pre_lnorm": False,
    "div_val": 1,
    "cutoffs": [],
    "attn_type": 0,
    "adaptive": False,
    "tie_word_embeddings": True,
    "proj_share_all_but_first": True,
    "sample_softmax": -1,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 0,
}
"""A shape in which no two sizes agree by accident: n_head * d_head is not d_model."""


def random_checkpoint(config: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``TINY`` changed by ``config``, and float32 weights for it under every name of a saved checkpoint, none of them zero or one.

    Among the names is the buffer ``transformer.pos_emb.inv_freq`` [d_model / 2], which saved checkpoints hold and readers may ignore.
    Where input and output matrices are tied, only the first is there; where biases are shared, only ``transformer.r_*_bias``.
    """
    config = {**TINY, **config}
    check(config)
    d_model, d_inner, n_head, d_head, vocab = (config[key] for key in ("d_model", "d_inner", "n_head", "d_head", "vocab_size"))
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, mean: float = 0.0, scale: float | None = None) -> None:
        # Wide enough that attention is far from uniform and every term of it can be missed.
        deviation = 1 / np.sqrt(shape[-1]) if scale is None else scale
        weights[name] = rng.normal(mean, deviation, shape).astype(np.float32)

    add("transformer.word_emb.emb_layers.0.weight", vocab, d_model, scale=1 / np.sqrt(d_model))
    weights["transformer.pos_emb.inv_freq"] = (1 / 10000 ** (np.arange(0, d_model, 2) / d_model)).astype(np.float32)
    owners = [f"transformer.layers.{layer}.dec_attn" for layer in range(config["n_layer"])] if config["untie_r"] else ["transformer"]
    for owner in owners:
        add(f"{owner}.r_w_bias", n_head, d_head, scale=1.0)
        add(f"{owner}.r_r_bias", n_head, d_head, scale=1.0)
    for layer in range(config["n_layer"]):
        name = f"transformer.layers.{layer}"
        add(f"{name}.dec_attn.qkv_net.weight", 3 * n_head * d_head, d_model)
        add(f"{name}.dec_attn.o_net.weight", d_model, n_head * d_head)
        add(f"{name}.dec_attn.r_net.weight", n_head * d_head, d_model)
        add(f"{name}.pos_ff.CoreNet.0.weight", d_inner, d_model)
        add(f"{name}.pos_ff.CoreNet.0.bias", d_inner, scale=0.3)
        add(f"{name}.pos_ff.CoreNet.3.weight", d_model, d_inner)
        add(f"{name}.pos_ff.CoreNet.3.bias", d_model, scale=0.3)
        for owner in ("dec_attn", "pos_ff"):
            add(f"{name}.{owner}.layer_norm.weight", d_model, mean=1.0, scale=0.2)
            add(f"{name}.{owner}.layer_norm.bias", d_model, scale=0.2)
    if not config["tie_word_embeddings"]:
        add("crit.out_layers.0.weight", vocab, d_model)
    add("crit.out_layers.0.bias", vocab, scale=0.3)
    return config, weights
