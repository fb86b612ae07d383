"""Softmax attention over what each sequence has kept, in its plain form.

Shape legend: B sequences of one cohort, Q query positions, C context positions, H heads, K key/value heads, d head dimension.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.backends.reference.step import TORCH_DTYPES, Cohort, Step
from hasten.formats.cache import LEAST_SCALE, MOST_SCALE, ROW_FORMATS, PlainRows
from hasten.program import KvGroup, RecurrentGroup, StateGroup
from hasten.program.ops import AppendKv, Attend, AttendRelative, AttentionMap, AttentionMapRelative
from hasten.spec import Causal, SegmentMemory, SlidingWindow, Visibility


def append(op: AppendKv, step: Step, k: Tensor, v: Tensor | None) -> None:
    """Lay k[T, K·d] and v[T, K·dv] behind what each sequence has kept, for the ops that attend, and hand on what stays visible.

    Both are rounded as the group's format has them; what is kept is what the format stands for, in the dtype it came in.
    A latent layer has no values of its own: its keys serve as both."""
    state_group = step.state_groups[op.state.group]
    heads = state_group.kv_heads if isinstance(state_group, KvGroup) else 1
    fresh = [as_cached(x.unflatten(-1, (heads, -1)), state_group.format) for x in (k, v) if x is not None]
    contexts = step.contexts[op.state] = []
    for cohort in step.cohorts:
        kept = [cohort.take(x) for x in fresh]
        pasts = [entry for sequence in cohort.sequences if (entry := step.past(op.state, sequence)) is not None]
        if pasts:
            kept = [torch.cat([torch.stack([entry[i] for entry in pasts]), x], dim=1) for i, x in enumerate(kept)]
        contexts.append((kept[0], kept[-1]))
        first = kept[0].shape[1] - _stays(state_group, cohort.start + cohort.length, kept[0].shape[1])
        step.keep(op.state, cohort, [tuple(x[index, first:] for x in kept) for index in range(len(cohort.sequences))])


def as_cached(x: Tensor, form: str) -> Tensor:
    """What a cache in the format ``form`` of formats/cache.py gives back of rows x[..., n]."""
    rows = ROW_FORMATS[form]
    if form in {"float32", "float64"}:  # stays as exact as it was computed
        return x
    if isinstance(rows, PlainRows):
        return x.to(TORCH_DTYPES[form]).to(x.dtype)
    exact = x.detach().float()  # rounding has no gradient
    most = exact.abs().amax(dim=-1, keepdim=True)
    wanted = (most / rows.largest).clamp(LEAST_SCALE, MOST_SCALE)
    half = wanted.half()
    scale = (half.view(torch.int16) + (half.float() < wanted)).to(torch.int16).view(torch.float16).float()  # rounded up
    ratio = (exact / scale).clamp(-rows.largest, rows.largest)
    near = ratio.round() if form == "int8" else ratio.to(torch.float8_e4m3fn).float()
    return torch.where(most.isfinite(), near * scale, math.nan).to(x.dtype)


def _stays(state_group: StateGroup, end: int, length: int) -> int:
    """How many of the last ``length`` positions a query at position ``end`` or later can still see."""
    if isinstance(state_group, RecurrentGroup):
        raise TypeError(f"{state_group.name} holds no keys and values")
    return min(length, end - state_group.oldest_visible(end))


def positions(cohort: Cohort, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the queries [Q, 1] and of the ``length`` context entries [1, C], which end where the queries end."""
    end = cohort.start + cohort.length
    return torch.arange(cohort.start, end, device=device)[:, None], torch.arange(end - length, end, device=device)[None, :]


def visible_mask(visible: Visibility, query: Tensor, key: Tensor) -> Tensor:
    """True where a query sees a key: bool [Q, C]."""
    mask = key <= query
    match visible:
        case SlidingWindow(size=size):
            mask = mask & (key > query - size)
        case SegmentMemory(segment=segment, memory=memory):
            mask = mask & (key >= query // segment * segment - memory)
    return mask


def attend(op: Attend, step: Step, q: Tensor) -> Tensor:
    """[T, H·d] → [T, H·dv]."""
    parts = []
    for cohort, (keys, values) in zip(step.cohorts, step.contexts[op.state]):
        queries = cohort.take(q).unflatten(-1, (op.heads, op.head_dim))
        parts.append(_attend(op, step, cohort, queries, keys, values[..., : op.value_dim]).flatten(-2))
    return step.scatter(parts)


def _attend(op: Attend, step: Step, cohort: Cohort, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Q, H, d], k, v [B, C, K, d] → [B, Q, H, dv]."""
    narrow_bias = op.slopes is not None and q.dtype.itemsize < 4  # the fused op wants the bias in q's dtype
    if op.softcap is not None or op.sinks is not None or narrow_bias:
        weights = _probabilities(op, step, cohort, q, k)
        shared = v.repeat_interleave(op.heads // op.kv_heads, dim=2)
        return torch.einsum("bhqc,bchd->bqhd", weights, shared.to(weights.dtype)).to(q.dtype)
    full = isinstance(op.visible, Causal) and op.slopes is None
    causal = full and cohort.length == k.shape[1]
    mask = None
    if not causal and not (full and cohort.length == 1):
        query, key = positions(cohort, k.shape[1], q.device)
        mask = visible_mask(op.visible, query, key)
        if op.slopes is not None:
            mask = _alibi(op.slopes, query, key, q.dtype).masked_fill(~mask, -math.inf)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal and cohort.length > 1, scale=op.scale,
        enable_gqa=op.heads != op.kv_heads,
    )  # fmt: skip
    return out.transpose(1, 2)


def attention_map(op: AttentionMap, step: Step, q: Tensor) -> Tensor:
    """[T, H·d] → probabilities [T, H, C]; shorter contexts end in zeros."""
    parts = []
    for cohort, (keys, _) in zip(step.cohorts, step.contexts[op.state]):
        queries = cohort.take(q).unflatten(-1, (op.heads, op.head_dim))
        parts.append(_probabilities(op, step, cohort, queries, keys).transpose(1, 2))
    longest = max(part.shape[-1] for part in parts)
    return step.scatter([F.pad(part, (0, longest - part.shape[-1])) for part in parts])


def _probabilities(op: Attend | AttentionMap, step: Step, cohort: Cohort, q: Tensor, k: Tensor) -> Tensor:
    """softmax(q·k·scale + bias), float32 at least: [B, H, Q, C]."""
    work = torch.promote_types(q.dtype, torch.float32)
    shared = k.repeat_interleave(op.heads // op.kv_heads, dim=2)
    scores = torch.einsum("bqhd,bchd->bhqc", q.to(work), shared.to(work)) * op.scale
    if op.softcap is not None:
        scores = op.softcap * torch.tanh(scores / op.softcap)
    query, key = positions(cohort, k.shape[1], q.device)
    if op.slopes is not None:
        scores = scores + _alibi(op.slopes, query, key, work)
    scores = scores.masked_fill(~visible_mask(op.visible, query, key), -math.inf)
    if op.sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = step.weight(op.sinks).to(work)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _alibi(slopes: tuple[float, ...], query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """slope · (key − query): [H, Q, C]."""
    return torch.tensor(slopes, device=query.device, dtype=dtype)[:, None, None] * (key - query).to(dtype)


def attend_relative(op: AttendRelative, step: Step, q: Tensor) -> Tensor:
    """[T, H·d] → [T, H·d]."""
    parts = []
    for cohort, (keys, values) in zip(step.cohorts, step.contexts[op.state]):
        weights = _relative_probabilities(op, step, cohort, cohort.take(q), keys)
        parts.append(torch.einsum("bhqc,bchd->bqhd", weights, values.to(weights.dtype)).flatten(-2).to(q.dtype))
    return step.scatter(parts)


def attention_map_relative(op: AttentionMapRelative, step: Step, q: Tensor) -> Tensor:
    """[T, H·d] → probabilities [T, H, C]; shorter contexts end in zeros."""
    made = [
        _relative_probabilities(op, step, cohort, cohort.take(q), keys).transpose(1, 2)
        for cohort, (keys, _) in zip(step.cohorts, step.contexts[op.state])
    ]
    longest = max(part.shape[-1] for part in made)
    return step.scatter([F.pad(part, (0, longest - part.shape[-1])) for part in made])


def _relative_probabilities(op: AttendRelative | AttentionMapRelative, step: Step, cohort: Cohort, q: Tensor, k: Tensor) -> Tensor:
    """Transformer-XL's scores, term by term, through the softmax: q [B, Q, H·d], k [B, C, H, d] → [B, H, Q, C]."""
    work = torch.promote_types(q.dtype, torch.float32)
    content_bias, position_bias = step.weight(op.content_bias).to(work), step.weight(op.position_bias).to(work)
    projection = step.weight(op.position_weight).to(work)
    queries = q.unflatten(-1, (op.heads, op.head_dim)).to(work)
    query, key = positions(cohort, k.shape[1], q.device)
    distance = (query - key).clamp(min=0)
    clamped = distance if op.clamp is None else distance.clamp(max=op.clamp)
    relative = (sinusoid(int(clamped.max()) + 1, op.width, work, q.device) @ projection.T).unflatten(-1, (op.heads, op.head_dim))
    by_content = torch.einsum("bqhd,bchd->bhqc", queries + content_bias, k.to(work))
    by_distance = torch.einsum("bqhd,rhd->bhqr", queries + position_bias, relative)
    by_position = by_distance.gather(-1, clamped.expand(*by_distance.shape[:2], -1, -1))
    scores = ((by_content + by_position) * op.scale).masked_fill(~visible_mask(op.visible, query, key), -math.inf)
    return torch.softmax(scores, dim=-1)


def sinusoid(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R[distance] = sines, then cosines, of distance / 10000^(2i/width): [count, width]."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
