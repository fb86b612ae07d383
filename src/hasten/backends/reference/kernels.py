"""Every op in torch: ``compute(op, step, *inputs)`` returns its outputs. What each must give is written at the op's class."""

from functools import singledispatch
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.backends.reference import attention, scans
from hasten.backends.reference.step import TORCH_DTYPES, Step
from hasten.program import Fused, ops
from hasten.program.ops import Op
from hasten.spec import Activation, ClampedSwiglu

Outputs = tuple[Tensor, ...]


@singledispatch
def compute(op: Op, step: Step, *inputs: Tensor) -> Outputs:
    """The outputs of ``op``, in the order its class declares them."""
    raise TypeError(f"reference has no kernel for {type(op).__name__}")


@compute.register
def _(op: Fused, step: Step, *inputs: Tensor) -> Outputs:
    values = dict(zip(op.inputs, inputs, strict=True))
    for part in op.parts:
        values.update(zip(part.outputs, compute(part, step, *(values[name] for name in part.inputs)), strict=True))
    return tuple(values[name] for name in op.outputs)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """A pointwise activation by its Spec name."""
    match activation:
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
    assert_never(activation)


# --- rows in and out


@compute.register
def _(op: ops.Embed, step: Step) -> Outputs:
    rows = F.embedding(step.tokens, step.weight(op.weight)).to(TORCH_DTYPES[op.dtype])
    return (rows if op.scale == 1.0 else rows * op.scale,)


@compute.register
def _(op: ops.EmbedPositions, step: Step) -> Outputs:
    return (F.embedding(step.positions + op.offset, step.weight(op.weight)).to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.SelectRows, step: Step, x: Tensor) -> Outputs:
    return (x if step.rows is None else x[step.rows],)


@compute.register
def _(op: ops.Split, step: Step, x: Tensor) -> Outputs:
    return tuple(x.split(op.sizes, dim=-1))


@compute.register
def _(op: ops.HeadSplit, step: Step, x: Tensor) -> Outputs:
    return tuple(part.flatten(-2) for part in x.unflatten(-1, (op.heads, -1)).split(op.sizes, dim=-1))


@compute.register
def _(op: ops.Concat, step: Step, *xs: Tensor) -> Outputs:
    return (torch.cat([x.unflatten(-1, (op.heads, -1)) for x in xs], dim=-1).flatten(-2),)


# --- dtypes


@compute.register
def _(op: ops.Cast, step: Step, x: Tensor) -> Outputs:
    return (x.to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.QuantizeRows, step: Step, x: Tensor) -> Outputs:
    x = x.detach()  # rounding has no gradient; a pass that trains through it says so with ops of its own
    scale = x.abs().amax(dim=-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale


@compute.register
def _(op: ops.QuantizeFp8, step: Step, x: Tensor) -> Outputs:
    x = x.detach()
    scale = x.abs().amax(dim=-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) / 448
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@compute.register
def _(op: ops.QuantizeFixed, step: Step, x: Tensor) -> Outputs:
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    q = torch.round(wide / op.step).nan_to_num(nan=127.0).clamp(-127, 127).to(torch.int8)
    return q, torch.full_like(wide[..., :1], op.step)


# --- linear


def as_fed(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a product's input stands for, as wide as the product is: x as it is, or int8 or fp8 rows times their scales."""
    return x.to(torch.promote_types(x.dtype, dtype)) if scale is None else x.to(scale.dtype) * scale


def stored_name(name: str, weight_format: str) -> str:
    """Where a linear weight in that format is found; the embedding may be the same weight as it came."""
    return name if weight_format == "dense" else f"{name} as {weight_format}"


@compute.register
def _(op: ops.Linear, step: Step, x: Tensor, scale: Tensor | None = None) -> Outputs:
    bias, x = step.optional(op.bias), as_fed(x, scale, TORCH_DTYPES[op.dtype])
    y = F.linear(x, step.weight(stored_name(op.weight, op.weight_format)).to(x.dtype), None if bias is None else bias.to(x.dtype))
    adapter = step.adapters.get(op.adapter or "")
    if adapter is not None:
        y = y + F.linear(F.linear(x, adapter.down.to(x.dtype)), adapter.up.to(x.dtype)) * adapter.scale
    return (y.to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.HeadLinear, step: Step, x: Tensor) -> Outputs:
    weight = step.weight(stored_name(op.weight, op.weight_format)).to(x.dtype)
    y = torch.einsum("thi,hoi->tho", x.unflatten(-1, (op.heads, -1)), weight).flatten(-2)
    return (y.to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.ExpertLinear, step: Step, x: Tensor, experts: Tensor, scale: Tensor | None = None) -> Outputs:
    weight, bias = step.weight(stored_name(op.weight, op.weight_format)), step.optional(op.bias)
    x = as_fed(x, scale, TORCH_DTYPES[op.dtype])
    chosen = experts.shape[-1]
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)  # assignments expert by expert
    counts = torch.bincount(flat, minlength=weight.shape[0]).tolist()
    rows = x[order // chosen] if x.dim() == 2 else x.flatten(0, 1)[order]
    parts = []
    for expert, part in enumerate(rows.split(counts)):
        if len(part):
            offset = None if bias is None else bias[expert].to(x.dtype)
            parts.append(F.linear(part, weight[expert].to(x.dtype), offset))
    return (torch.cat(parts)[torch.argsort(order)].unflatten(0, (-1, chosen)).to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.Route, step: Step, logits: Tensor) -> Outputs:
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = torch.sigmoid(work) if op.score == "sigmoid" else torch.softmax(work, dim=-1)
    ranking = scores if op.correction is None else scores + step.weight(op.correction).to(scores.dtype)
    if op.groups > 1:
        grouped = ranking.unflatten(-1, (op.groups, -1))
        best_two = grouped.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
        losers = best_two.argsort(dim=-1, descending=True, stable=True)[..., op.top_groups :]
        ranking = grouped.masked_fill(
            torch.zeros_like(best_two, dtype=torch.bool).scatter(-1, losers, True)[..., None], -torch.inf
        ).flatten(-2)
    chosen = ranking.argsort(dim=-1, descending=True, stable=True)[..., : op.top_k]
    weights = scores.gather(-1, chosen)
    if op.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return chosen.to(torch.int32), (weights * op.scale).to(logits.dtype)


@compute.register
def _(op: ops.Combine, step: Step, x: Tensor, weights: Tensor) -> Outputs:
    return ((x * weights[..., None].to(x.dtype)).sum(dim=-2),)


# --- norms and pointwise


@compute.register
def _(op: ops.RmsNorm, step: Step, x: Tensor) -> Outputs:
    dtype = TORCH_DTYPES[op.dtype]
    weight = step.weight(op.weight)
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = weight.to(work.dtype) if op.offset == 0 else weight.to(work.dtype) + op.offset
    if op.group == x.shape[-1]:
        return (F.rms_norm(work, (op.group,), factor, op.eps).to(dtype),)
    grouped = work.unflatten(-1, (-1, op.group))
    normed = F.rms_norm(grouped, (op.group,), None, op.eps) * (factor if len(factor) == op.group else factor.unflatten(0, (-1, op.group)))
    return (normed.flatten(-2).to(dtype),)


@compute.register
def _(op: ops.LayerNorm, step: Step, x: Tensor) -> Outputs:
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = work.unflatten(-1, (-1, op.group))
    weight, bias = step.weight(op.weight).to(work.dtype), step.optional(op.bias)
    normed = F.layer_norm(grouped, (op.group,), None, None, op.eps)
    normed = normed * weight.unflatten(0, (-1, op.group))
    if bias is not None:
        normed = normed + bias.to(work.dtype).unflatten(0, (-1, op.group))
    return (normed.flatten(-2).to(TORCH_DTYPES[op.dtype]),)


@compute.register
def _(op: ops.Add, step: Step, a: Tensor, b: Tensor) -> Outputs:
    return ((a + b).to(a.dtype),)


@compute.register
def _(op: ops.Scale, step: Step, x: Tensor) -> Outputs:
    return (x * op.factor,)


@compute.register
def _(op: ops.Clip, step: Step, x: Tensor) -> Outputs:
    return (x.clamp(-op.limit, op.limit),)


@compute.register
def _(op: ops.SoftCap, step: Step, x: Tensor) -> Outputs:
    return (op.cap * torch.tanh(x / op.cap),)


@compute.register
def _(op: ops.Activate, step: Step, x: Tensor) -> Outputs:
    return (activate(x, op.activation),)


@compute.register
def _(op: ops.Gate, step: Step, gate: Tensor, up: Tensor) -> Outputs:
    if isinstance(op.activation, ClampedSwiglu):
        gate = gate.clamp(max=op.activation.limit)
        up = up.clamp(-op.activation.limit, op.activation.limit)
        return (gate * torch.sigmoid(op.activation.alpha * gate) * (up + 1),)
    return (activate(gate, op.activation) * up,)


# --- positions and attention


@compute.register
def _(op: ops.Rotate, step: Step, x: Tensor) -> Outputs:
    work = torch.promote_types(x.dtype, torch.float32)

    def make() -> tuple[Tensor, Tensor]:
        frequencies = torch.tensor(op.frequencies, dtype=torch.float32, device=x.device)
        angles = (step.positions[:, None].float() * frequencies).to(work)
        return (angles.cos() * op.magnitude).to(x.dtype)[:, None], (angles.sin() * op.magnitude).to(x.dtype)[:, None]

    cos, sin = step.table((op.frequencies, op.magnitude, x.dtype), make)
    heads = x.unflatten(-1, (op.heads, -1))
    before, turned, after = heads.split((op.start, op.dims, heads.shape[-1] - op.start - op.dims), dim=-1)
    if op.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    whole = turned.shape[-1] == heads.shape[-1]
    return ((turned if whole else torch.cat([before, turned, after], dim=-1)).flatten(-2),)


@compute.register
def _(op: ops.AppendKv, step: Step, k: Tensor, v: Tensor | None = None) -> Outputs:
    attention.append(op, step, k, v)
    return ()


@compute.register
def _(op: ops.Attend, step: Step, q: Tensor) -> Outputs:
    return (attention.attend(op, step, q),)


@compute.register
def _(op: ops.AttendRelative, step: Step, q: Tensor) -> Outputs:
    return (attention.attend_relative(op, step, q),)


@compute.register
def _(op: ops.AttentionMap, step: Step, q: Tensor) -> Outputs:
    return (attention.attention_map(op, step, q),)


@compute.register
def _(op: ops.AttentionMapRelative, step: Step, q: Tensor) -> Outputs:
    return (attention.attention_map_relative(op, step, q),)


# --- recurrences


@compute.register
def _(op: ops.CausalConv, step: Step, x: Tensor) -> Outputs:
    return (scans.causal_conv(op, step, x, activate),)


@compute.register
def _(op: ops.SelectiveScan, step: Step, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Outputs:
    return (scans.selective_scan(op, step, x, dt, b, c),)


@compute.register
def _(op: ops.DualScan, step: Step, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Outputs:
    return (scans.dual_scan(op, step, x, dt, b, c),)


@compute.register
def _(op: ops.GatedDeltaScan, step: Step, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Outputs:
    return (scans.gated_delta_scan(op, step, q, k, v, a, b),)


@compute.register
def _(op: ops.LinearScan, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (scans.linear_scan(op, step, q, k, v),)
