"""Recurrences over time: convolutions and state-space scans, carrying state across steps.

Shape legend: B sequences of one cohort, L positions, N channels, H heads, P head dimension, S states.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.backends.reference.step import Cohort, Step
from hasten.program import StateRef
from hasten.program.ops import FEATURE_FLOOR, CausalConv, DualScan, GatedDeltaScan, LinearScan, SelectiveScan
from hasten.spec import Activation

_CHUNK = 64  # positions that DualScan and LinearScan treat as one quadratic block


def recurrent_past(step: Step, cohort: Cohort, ref: StateRef, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The kept array of every sequence of the cohort [B, *shape], zeros at the beginning."""
    pasts = [step.past(ref, sequence) for sequence in cohort.sequences]
    zeros = like.new_zeros(shape)
    return torch.stack([zeros if entry is None else entry[0].to(like.dtype) for entry in pasts])


def causal_conv(op: CausalConv, step: Step, x: Tensor, activate: Callable[[Tensor, Activation], Tensor]) -> Tensor:
    """[T, N] → [T, N]."""
    weight, bias = step.weight(op.weight).to(x.dtype), step.optional(op.bias)
    channels, taps = weight.shape
    parts = []
    for cohort in step.cohorts:
        rows = cohort.take(x)
        padded = torch.cat([recurrent_past(step, cohort, op.state, (taps - 1, channels), rows), rows], dim=1)
        step.keep(op.state, cohort, [(kept,) for kept in padded[:, padded.shape[1] - taps + 1 :]])
        bias_ = None if bias is None else bias.to(x.dtype)
        y = F.conv1d(padded.transpose(1, 2), weight[:, None, :], bias_, groups=channels).transpose(1, 2)
        parts.append(y if op.activation is None else activate(y, op.activation))
    return step.scatter(parts)


def selective_scan(op: SelectiveScan, step: Step, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Position by position: [T, N] → [T, N]."""
    work = torch.promote_types(x.dtype, torch.float32)
    decay = -torch.exp(step.weight(op.a_log).to(work))
    skip, dt_bias = step.weight(op.d).to(work), step.weight(op.dt_bias).to(work)
    parts = []
    for cohort in step.cohorts:
        u, rate, into, out = (cohort.take(value).to(work) for value in (x, dt, b, c))
        rate = F.softplus(rate + dt_bias)
        keep = torch.exp(rate[..., None] * decay)  # [B, L, N, S]
        add = (rate * u)[..., None] * into[:, :, None, :]
        h = recurrent_past(step, cohort, op.state, tuple(decay.shape), u)
        ys = []
        for t in range(cohort.length):
            h = keep[:, t] * h + add[:, t]
            ys.append(torch.einsum("bns,bs->bn", h, out[:, t]))
        step.keep(op.state, cohort, [(kept,) for kept in h])
        parts.append((torch.stack(ys, dim=1) + skip * u).to(x.dtype))
    return step.scatter(parts)


def dual_scan(op: DualScan, step: Step, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba-2 in blocks: quadratic inside a block, the state between blocks (Dao & Gu 2024, section 6). [T, H·P] → [T, H·P]."""
    work = torch.promote_types(x.dtype, torch.float32)
    decay = -torch.exp(step.weight(op.a_log).to(work))
    skip, dt_bias = step.weight(op.d).to(work), step.weight(op.dt_bias).to(work)
    ratio = op.heads // op.groups
    parts = []
    for cohort in step.cohorts:
        u = cohort.take(x).to(work).unflatten(-1, (op.heads, -1))  # [B, L, H, P]
        rate = F.softplus(cohort.take(dt).to(work) + dt_bias).clamp(op.dt_min, math.inf if op.dt_max is None else op.dt_max)
        into, out = (cohort.take(v).to(work).unflatten(-1, (op.groups, -1)).repeat_interleave(ratio, dim=2) for v in (b, c))  # [B, L, H, S]
        h = recurrent_past(step, cohort, op.state, (op.heads, u.shape[-1], into.shape[-1]), u)
        ys = []
        for begin in range(0, cohort.length, _CHUNK):
            block = slice(begin, begin + _CHUNK)
            y, h = _dual_block(u[:, block] * rate[:, block, :, None], rate[:, block] * decay, into[:, block], out[:, block], h)
            ys.append(y)
        step.keep(op.state, cohort, [(kept,) for kept in h])
        parts.append((torch.cat(ys, dim=1) + skip[:, None] * u).flatten(-2).to(x.dtype))
    return step.scatter(parts)


def _dual_block(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One block: x [B, L, H, P] (times dt), log_decay [B, L, H], b, c [B, L, H, S], h [B, H, P, S] → y, h."""
    total = log_decay.cumsum(dim=1).transpose(1, 2)  # [B, H, L]
    gap = total[..., :, None] - total[..., None, :]
    past = torch.ones(gap.shape[-2:], dtype=torch.bool, device=x.device).tril()
    weight = torch.exp(gap.masked_fill(~past, -math.inf)) * torch.einsum("blhs,bmhs->bhlm", c, b)
    y = torch.einsum("bhlm,bmhp->blhp", weight, x) + torch.einsum("bhl,blhs,bhps->blhp", total.exp(), c, h)
    remaining = torch.exp(total[..., -1:] - total)
    return y, h * total[..., -1].exp()[..., None, None] + torch.einsum("bhl,blhp,blhs->bhps", remaining, x, b)


def gated_delta_scan(op: GatedDeltaScan, step: Step, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Position by position: [T, value_heads · value_dim]."""
    work = torch.promote_types(q.dtype, torch.float32)
    decay, dt_bias = -torch.exp(step.weight(op.a_log).to(work)), step.weight(op.dt_bias).to(work)
    ratio = op.value_heads // op.key_heads
    parts = []
    for cohort in step.cohorts:
        queries, keys = (
            _unit(cohort.take(x).to(work).unflatten(-1, (op.key_heads, -1))).repeat_interleave(ratio, dim=2) for x in (q, k)
        )  # [B, L, H, dk]
        queries = queries * queries.shape[-1] ** -0.5
        values = cohort.take(v).to(work).unflatten(-1, (op.value_heads, -1))
        keep = torch.exp(decay * F.softplus(cohort.take(a).to(work) + dt_bias))  # [B, L, H]
        beta = torch.sigmoid(cohort.take(b).to(work))
        s = recurrent_past(step, cohort, op.state, (op.value_heads, keys.shape[-1], values.shape[-1]), values)
        ys = []
        for t in range(cohort.length):
            s = s * keep[:, t, :, None, None]
            change = (values[:, t] - torch.einsum("bhkv,bhk->bhv", s, keys[:, t])) * beta[:, t, :, None]
            s = s + keys[:, t, :, :, None] * change[:, :, None, :]
            ys.append(torch.einsum("bhkv,bhk->bhv", s, queries[:, t]))
        step.keep(op.state, cohort, [(kept,) for kept in s])
        parts.append(torch.stack(ys, dim=1).flatten(-2).to(q.dtype))
    return step.scatter(parts)


def linear_scan(op: LinearScan, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In blocks, as DualScan: quadratic inside a block, the state between blocks. [T, heads·value_dim]."""
    work = torch.promote_types(q.dtype, torch.float32)
    parts = []
    for cohort in step.cohorts:
        queries = features(cohort.take(q).to(work).unflatten(-1, (op.kv_heads, op.heads // op.kv_heads, op.head_dim)))  # [B, L, K, G, F]
        keys = features(cohort.take(k).to(work).unflatten(-1, (op.kv_heads, op.head_dim)))  # [B, L, K, F]
        values = F.pad(cohort.take(v).to(work).unflatten(-1, (op.kv_heads, op.value_dim)), (0, 1), value=1.0)  # [B, L, K, V + 1]
        s = recurrent_past(step, cohort, op.state, (op.kv_heads, 2 * op.head_dim, op.value_dim + 1), values)
        ys = []
        for begin in range(0, cohort.length, _CHUNK):
            block = slice(begin, begin + _CHUNK)
            y, s = _linear_block(queries[:, block], keys[:, block], values[:, block], s)
            ys.append(y)
        step.keep(op.state, cohort, [(kept,) for kept in s])
        z = torch.cat(ys, dim=1)
        parts.append((z[..., :-1] / z[..., -1:]).flatten(-3).to(q.dtype))
    return step.scatter(parts)


def features(x: Tensor) -> Tensor:
    """Hedgehog's [softmax(x), softmax(−x)] along the last axis, none below FEATURE_FLOOR: [..., N] → [..., 2·N]."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp_min(FEATURE_FLOOR)


def _linear_block(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One block of features: q [B, L, K, G, F], k [B, L, K, F], v [B, L, K, V], s [B, K, F, V] → z [B, L, K, G, V], s."""
    weight = torch.einsum("blkgf,bmkf->bkglm", q, k).tril()
    z = torch.einsum("bkglm,bmkv->blkgv", weight, v) + torch.einsum("blkgf,bkfv->blkgv", q, s)
    return z, s + torch.einsum("blkf,blkv->bkfv", k, v)


def _unit(x: Tensor) -> Tensor:
    """Unit length along the last axis, with the 1e-6 that keeps zero vectors zero."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)
