"""Every op written again from its docstring: NumPy, float64, plain loops. Shares no code with the reference backend."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from hasten.program import Batch, StateGroup, StateRef, ops
from hasten.spec import Causal, ClampedSwiglu, SegmentMemory, SlidingWindow


@dataclasses.dataclass
class World:
    """What an op may look at. ``past`` holds what was kept of each sequence, () at its beginning; ``after`` collects what is kept now."""

    values: dict[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    batch: Batch
    groups: Mapping[str, StateGroup]
    past: Mapping[StateRef, list[tuple[np.ndarray, ...]]]
    context: dict[StateRef, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(default_factory=dict)
    after: dict[StateRef, list[tuple[np.ndarray, ...]]] = dataclasses.field(default_factory=dict)

    def sequences(self):
        """(sequence, its first row, the row behind its last, position of its first)."""
        offsets = self.batch.offsets.tolist()
        for s, (begin, end) in enumerate(zip(offsets, offsets[1:])):
            yield s, begin, end, int(self.batch.positions[begin])

    def entry(self, ref, sequence):
        return self.past[ref][sequence] if ref in self.past else ()


def run(op: ops.Op, world: World) -> None:
    """Play one op, adding its outputs to ``world.values``."""
    made = ORACLES[type(op)](op, world, *(world.values[name] for name in op.inputs))
    world.values.update(zip(op.outputs, made, strict=True))


# --- pointwise


def relu(x):
    return max(x, 0.0)


def silu(x):
    return x / (1 + math.exp(-x))


POINTWISE = {
    "relu": relu,
    "relu_squared": lambda x: relu(x) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": silu,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


def pointwise(function, *arrays):
    arrays = np.broadcast_arrays(*arrays)
    flat = [function(*map(float, numbers)) for numbers in zip(*(array.ravel() for array in arrays))]
    return np.array(flat, dtype=np.float64).reshape(arrays[0].shape)


def softplus(x):
    return math.log1p(math.exp(x))


def add(op, world, a, b):
    return (pointwise(lambda p, q: p + q, a, b),)


def scale(op, world, x):
    return (pointwise(lambda p: p * op.factor, x),)


def clip(op, world, x):
    return (pointwise(lambda p: min(max(p, -op.limit), op.limit), x),)


def soft_cap(op, world, x):
    return (pointwise(lambda p: op.cap * math.tanh(p / op.cap), x),)


def activate(op, world, x):
    return (pointwise(POINTWISE[op.activation], x),)


def gate(op, world, gates, up):
    if isinstance(op.activation, ClampedSwiglu):
        alpha, limit = op.activation.alpha, op.activation.limit

        def clamped(g, u):
            g, u = min(g, limit), min(max(u, -limit), limit)
            return g * (1 / (1 + math.exp(-alpha * g))) * (u + 1)

        return (pointwise(clamped, gates, up),)
    return (pointwise(lambda g, u: POINTWISE[op.activation](g) * u, gates, up),)


# --- rows in and out


def embed(op, world):
    return (np.array([[number * op.scale for number in world.weights[op.weight][token]] for token in world.batch.tokens]),)


def embed_positions(op, world):
    return (np.array([world.weights[op.weight][position + op.offset] for position in world.batch.positions]),)


def select_rows(op, world, x):
    return (np.array([x[row] for row in world.batch.rows]).reshape(-1, x.shape[1]),)


def split(op, world, x):
    ends = [sum(op.sizes[: i + 1]) for i in range(len(op.sizes))]
    return tuple(x[:, end - size : end] for end, size in zip(ends, op.sizes))


def head_split(op, world, x):
    whole = sum(op.sizes)
    parts, begin = [], 0
    for size in op.sizes:
        parts.append(x[:, [h * whole + begin + i for h in range(op.heads) for i in range(size)]])
        begin += size
    return tuple(parts)


def concat(op, world, *xs):
    rows = []
    for t in range(len(xs[0])):
        row = []
        for h in range(op.heads):
            for x in xs:
                size = x.shape[1] // op.heads
                row.extend(x[t, h * size : (h + 1) * size])
        rows.append(row)
    return (np.array(rows),)


# --- dtypes


def cast(op, world, x):
    bits = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}[op.dtype]

    def rounded(number):
        fraction, exponent = math.frexp(number)
        return math.ldexp(round(fraction * 2**bits), exponent - bits)  # round() goes to even; normal numbers only

    return (pointwise(rounded, x),)


def quantize_rows(op, world, x):
    scales = [max(abs(float(number)) for number in row) / 127 or 1.0 for row in x]
    q = np.array([[round(float(number) / s) for number in row] for row, s in zip(x, scales)], dtype=np.int8)
    return q, np.array(scales)[:, None]


E4M3 = {(-1) ** sign * (1 + part / 8) * 2.0 ** (power - 7) if power else (-1) ** sign * part / 8 * 2.0**-6: part
        for sign in (0, 1) for power in range(16) for part in range(8) if (power, part) != (15, 7)}  # fmt: skip


def quantize_fp8(op, world, x):
    """Of all numbers of e4m3 the nearest; of two the one whose last bit is 0."""
    scales = [max(abs(float(number)) for number in row) / 448 or 1.0 for row in x]
    nearest = [[min(E4M3, key=lambda each: (abs(each - float(number) / s), E4M3[each] % 2)) for number in row] for row, s in zip(x, scales)]
    return np.array(nearest), np.array(scales)[:, None]


def quantize_fixed(op, world, x):
    q = np.array([[max(-127, min(127, round(float(number) / op.step))) for number in row] for row in x], dtype=np.int8)
    return q, np.full((len(x), 1), op.step)


# --- linear


def dot(a, b):
    return sum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def linear(op, world, x, scale=None):
    x = x if scale is None else x.astype(float) * scale
    weight = world.weights[op.weight]
    bias = world.weights[op.bias] if op.bias else np.zeros(len(weight))
    return (np.array([[dot(row, weight[o]) + bias[o] for o in range(len(weight))] for row in x]),)


def head_linear(op, world, x):
    weight = world.weights[op.weight]
    size = weight.shape[2]
    rows = [[dot(row[h * size : (h + 1) * size], out) for h in range(op.heads) for out in weight[h]] for row in x]
    return (np.array(rows),)


def expert_linear(op, world, x, experts, scale=None):
    x = x if scale is None else x.astype(float) * scale
    weight = world.weights[op.weight]
    y = np.zeros((*experts.shape, weight.shape[1]))
    for t, a in np.ndindex(experts.shape):
        expert = experts[t, a]
        row = x[t] if x.ndim == 2 else x[t, a]
        for o in range(weight.shape[1]):
            y[t, a, o] = dot(row, weight[expert, o]) + (world.weights[op.bias][expert, o] if op.bias else 0.0)
    return (y,)


def route(op, world, logits):
    count = logits.shape[1]
    correction = world.weights[op.correction] if op.correction else np.zeros(count)
    experts, weights = [], []
    for row in logits:
        if op.score == "sigmoid":
            scores = [1 / (1 + math.exp(-float(number))) for number in row]
        else:
            total = sum(math.exp(float(number) - max(row)) for number in row)
            scores = [math.exp(float(number) - max(row)) / total for number in row]
        ranking = [score + float(c) for score, c in zip(scores, correction)]
        size = count // op.groups
        members = [range(g * size, (g + 1) * size) for g in range(op.groups)]
        two_best = [sum(sorted((ranking[e] for e in group), reverse=True)[:2]) for group in members]
        competing = sorted(range(op.groups), key=lambda g: (-two_best[g], g))[: op.top_groups] if op.groups > 1 else [0]
        chosen = sorted((e for g in competing for e in members[g]), key=lambda e: (-ranking[e], e))[: op.top_k]
        total = sum(scores[e] for e in chosen) if op.normalize else 1.0
        experts.append(chosen)
        weights.append([scores[e] / total * op.scale for e in chosen])
    return np.array(experts, dtype=np.int32), np.array(weights)


def combine(op, world, x, weights):
    y = np.zeros((x.shape[0], x.shape[2]))
    for t, a in np.ndindex(weights.shape):
        y[t] += weights[t, a] * x[t, a]
    return (y,)


# --- norms


def runs_of(x, group):
    for t in range(x.shape[0]):
        for begin in range(0, x.shape[1], group):
            yield t, begin, [float(number) for number in x[t, begin : begin + group]]


def of_run(weight, begin, i):
    """The weight covers one run, or the whole row."""
    return float(weight[(begin + i) % len(weight)])


def rms_norm(op, world, x):
    weight, y = world.weights[op.weight], np.zeros_like(x)
    for t, begin, run_ in runs_of(x, op.group):
        root = math.sqrt(sum(number * number for number in run_) / op.group + op.eps)
        for i, number in enumerate(run_):
            y[t, begin + i] = number / root * (op.offset + of_run(weight, begin, i))
    return (y,)


def layer_norm(op, world, x):
    weight, y = world.weights[op.weight], np.zeros_like(x)
    for t, begin, run_ in runs_of(x, op.group):
        mean = sum(run_) / op.group
        root = math.sqrt(sum((number - mean) ** 2 for number in run_) / op.group + op.eps)
        for i, number in enumerate(run_):
            bias = of_run(world.weights[op.bias], begin, i) if op.bias else 0.0
            y[t, begin + i] = (number - mean) / root * of_run(weight, begin, i) + bias
    return (y,)


# --- positions and attention


def rotate(op, world, x):
    y, size = x.copy(), x.shape[1] // op.heads
    for t, position in enumerate(world.batch.positions):
        for i in range(op.dims // 2):
            angle = float(np.float32(position) * np.float32(op.frequencies[i]))
            cos, sin = math.cos(angle) * op.magnitude, math.sin(angle) * op.magnitude
            first, second = (2 * i, 2 * i + 1) if op.interleaved else (i, i + op.dims // 2)
            for h in range(op.heads):
                p, q = h * size + op.start + first, h * size + op.start + second
                y[t, p] = x[t, p] * cos - x[t, q] * sin
                y[t, q] = x[t, q] * cos + x[t, p] * sin
    return (y,)


def sees(visible, query, key):
    """May a query at this position look at that key?"""
    if key > query:
        return False
    match visible:
        case Causal():
            return True
        case SlidingWindow(size=size):
            return query - key < size  # the last `size` positions, its own among them
        case SegmentMemory(segment=segment, memory=memory):
            own = [p for p in range(query + 1) if p // segment == query // segment]
            return key >= min(own) - memory
    raise AssertionError(visible)


def append_kv(op, world, k, v=None):
    group = world.groups[op.state.group]
    heads = getattr(group, "kv_heads", 1)
    world.context[op.state], world.after[op.state] = [], []
    for s, begin, end, start in world.sequences():
        fresh = [x[begin:end].reshape(end - begin, heads, -1) for x in (k, v) if x is not None]
        past = world.entry(op.state, s)
        whole = [np.concatenate([past[i], x]) if past else x for i, x in enumerate(fresh)]
        world.context[op.state].append((whole[0], whole[-1]))
        stop = start + end - begin
        held = range(stop - len(whole[0]), stop)
        wanted = [i for i, key in enumerate(held) if any(sees(group.visible, query, key) for query in range(stop, stop + 50))]
        world.after[op.state].append(tuple(x[wanted] for x in whole))
    return ()


def probabilities(op, world, q, score):
    """Per token and head, {context index: probability}; ``score(h, query row, key, query position, key position)``."""
    for s, begin, end, start in world.sequences():
        keys, values = world.context[op.state][s]
        oldest = start + end - begin - len(keys)
        for t in range(begin, end):
            position = start + t - begin
            for h in range(op.heads):
                scores = {}
                for c in range(len(keys)):
                    if sees(op.visible, position, oldest + c):
                        scores[c] = score(h, q[t, h * op.head_dim : (h + 1) * op.head_dim], keys[c], position, oldest + c)
                total = sum(math.exp(number) for number in scores.values())
                if getattr(op, "sinks", None):
                    total += math.exp(float(world.weights[op.sinks][h]))
                yield t, h, {c: math.exp(number) / total for c, number in scores.items()}, values


def score_of(op):
    def score(h, query, keys, query_position, key_position):
        number = dot(query, keys[h // (op.heads // op.kv_heads)]) * op.scale
        if op.softcap is not None:
            number = op.softcap * math.tanh(number / op.softcap)
        if op.slopes is not None:
            number += op.slopes[h] * (key_position - query_position)
        return number

    return score


def attend(op, world, q):
    y = np.zeros((len(q), op.heads, op.value_dim))
    for t, h, weights, values in probabilities(op, world, q, score_of(op)):
        for c, weight in weights.items():
            y[t, h] += weight * values[c, h // (op.heads // op.kv_heads), : op.value_dim]
    return (y.reshape(len(q), -1),)


def attention_map(op, world, q):
    longest = max(len(keys) for keys, _ in world.context[op.state])
    y = np.zeros((len(q), op.heads, longest))
    for t, h, weights, _ in probabilities(op, world, q, score_of(op)):
        for c, weight in weights.items():
            y[t, h, c] = weight
    return (y,)


def relative_score_of(op, world):
    projection = world.weights[op.position_weight].reshape(op.heads, op.head_dim, op.width)
    u, w = world.weights[op.content_bias], world.weights[op.position_bias]

    def sinusoid(distance):
        angles = [distance / 10000 ** (2 * i / op.width) for i in range(op.width // 2)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    def score(h, query, keys, query_position, key_position):
        distance = query_position - key_position
        if op.clamp is not None:
            distance = min(distance, op.clamp)
        placed = [dot(row, sinusoid(distance)) for row in projection[h]]
        return (dot(query + u[h], keys[h]) + dot(query + w[h], placed)) * op.scale

    return score


def attend_relative(op, world, q):
    y = np.zeros((len(q), op.heads, op.head_dim))
    for t, h, weights, values in probabilities(op, world, q, relative_score_of(op, world)):
        for c, weight in weights.items():
            y[t, h] += weight * values[c, h]
    return (y.reshape(len(q), -1),)


def attention_map_relative(op, world, q):
    longest = max(len(keys) for keys, _ in world.context[op.state])
    y = np.zeros((len(q), op.heads, longest))
    for t, h, weights, _ in probabilities(op, world, q, relative_score_of(op, world)):
        for c, weight in weights.items():
            y[t, h, c] = weight
    return (y,)


# --- recurrences


def causal_conv(op, world, x):
    weight = world.weights[op.weight]
    channels, taps = weight.shape
    y = np.zeros_like(x)
    world.after[op.state] = []
    for s, begin, end, _ in world.sequences():
        past = world.entry(op.state, s)
        rows = np.concatenate([past[0] if past else np.zeros((taps - 1, channels)), x[begin:end]])  # row t of x is row t + taps − 1 here
        for t in range(end - begin):
            for n in range(channels):
                number = sum(float(weight[n, i] * rows[t + i, n]) for i in range(taps)) + (world.weights[op.bias][n] if op.bias else 0.0)
                y[begin + t, n] = number if op.activation is None else POINTWISE[op.activation](number)
        world.after[op.state].append((rows[len(rows) - (taps - 1) :],))
    return (y,)


def begin_with(world, ref, sequence, shape):
    past = world.entry(ref, sequence)
    return past[0].copy() if past else np.zeros(shape)


def selective_scan(op, world, x, dt, b, c):
    a_log, d, dt_bias = world.weights[op.a_log], world.weights[op.d], world.weights[op.dt_bias]
    y, world.after[op.state] = np.zeros_like(x), []
    for s, begin, end, _ in world.sequences():
        h = begin_with(world, op.state, s, a_log.shape)
        for t in range(begin, end):
            for n in range(a_log.shape[0]):
                rate = softplus(dt[t, n] + dt_bias[n])
                for i in range(a_log.shape[1]):
                    h[n, i] = math.exp(rate * -math.exp(a_log[n, i])) * h[n, i] + rate * b[t, i] * x[t, n]
                y[t, n] = dot(c[t], h[n]) + d[n] * x[t, n]
        world.after[op.state].append((h,))
    return (y,)


def dual_scan(op, world, x, dt, b, c):
    a_log, d, dt_bias = world.weights[op.a_log], world.weights[op.d], world.weights[op.dt_bias]
    width, states = x.shape[1] // op.heads, b.shape[1] // op.groups
    y, world.after[op.state] = np.zeros_like(x), []
    for s, begin, end, _ in world.sequences():
        h = begin_with(world, op.state, s, (op.heads, width, states))
        for t in range(begin, end):
            for head in range(op.heads):
                rate = max(softplus(dt[t, head] + dt_bias[head]), op.dt_min)
                rate = rate if op.dt_max is None else min(rate, op.dt_max)
                group = head // (op.heads // op.groups)
                into, out = (v[t, group * states : (group + 1) * states] for v in (b, c))
                row = x[t, head * width : (head + 1) * width]
                h[head] = math.exp(rate * -math.exp(a_log[head])) * h[head] + rate * np.outer(row, into)
                y[t, head * width : (head + 1) * width] = h[head] @ out + d[head] * row
        world.after[op.state].append((h,))
    return (y,)


def gated_delta_scan(op, world, q, k, v, a, b):
    a_log, dt_bias = world.weights[op.a_log], world.weights[op.dt_bias]
    key_dim, value_dim = q.shape[1] // op.key_heads, v.shape[1] // op.value_heads
    y, world.after[op.state] = np.zeros_like(v), []
    for s, begin, end, _ in world.sequences():
        state = begin_with(world, op.state, s, (op.value_heads, key_dim, value_dim))
        for t in range(begin, end):
            for h in range(op.value_heads):
                kh = h // (op.value_heads // op.key_heads)
                query, key = (x[t, kh * key_dim : (kh + 1) * key_dim] for x in (q, k))
                query, key = (x / math.sqrt(dot(x, x) + 1e-6) for x in (query, key))
                value = v[t, h * value_dim : (h + 1) * value_dim]
                state[h] *= math.exp(-math.exp(a_log[h]) * softplus(a[t, h] + dt_bias[h]))
                change = (value - state[h].T @ key) / (1 + math.exp(-b[t, h]))
                state[h] += np.outer(key, change)
                y[t, h * value_dim : (h + 1) * value_dim] = state[h].T @ query / math.sqrt(key_dim)
        world.after[op.state].append((state,))
    return (y,)


def linear_scan(op, world, q, k, v):
    def features(row):
        rises, falls = np.exp(row - row.max()), np.exp(row.min() - row)
        return np.maximum(np.concatenate([rises / rises.sum(), falls / falls.sum()]), 1e-12)

    y, world.after[op.state] = np.zeros((len(q), op.heads * op.value_dim)), []
    for s, begin, end, _ in world.sequences():
        past = begin_with(world, op.state, s, (op.kv_heads, 2 * op.head_dim, op.value_dim + 1))
        keys = [[features(row) for row in k[t].reshape(op.kv_heads, -1)] for t in range(begin, end)]
        values = [[np.append(row, 1.0) for row in v[t].reshape(op.kv_heads, -1)] for t in range(begin, end)]
        for t in range(begin, end):  # every query with every key before it: no state within the step
            for h, row in enumerate(q[t].reshape(op.heads, -1)):
                head, query = h // (op.heads // op.kv_heads), features(row)
                z = query @ past[head]
                for seen in range(t - begin + 1):
                    z = z + dot(query, keys[seen][head]) * values[seen][head]
                y[t, h * op.value_dim : (h + 1) * op.value_dim] = z[:-1] / z[-1]
        for key, value in zip(keys, values):
            past = past + np.stack([np.outer(a, b) for a, b in zip(key, value)])
        world.after[op.state].append((past,))
    return (y,)


ORACLES = {
    ops.Embed: embed, ops.EmbedPositions: embed_positions, ops.SelectRows: select_rows, ops.Split: split, ops.Concat: concat,
    ops.HeadSplit: head_split, ops.Cast: cast, ops.QuantizeRows: quantize_rows, ops.QuantizeFp8: quantize_fp8,
    ops.QuantizeFixed: quantize_fixed, ops.Linear: linear,
    ops.HeadLinear: head_linear, ops.ExpertLinear: expert_linear, ops.Route: route, ops.Combine: combine, ops.RmsNorm: rms_norm,
    ops.LayerNorm: layer_norm,
    ops.Add: add, ops.Scale: scale, ops.Clip: clip, ops.SoftCap: soft_cap, ops.Activate: activate, ops.Gate: gate, ops.Rotate: rotate,
    ops.AppendKv: append_kv, ops.Attend: attend, ops.AttendRelative: attend_relative, ops.AttentionMap: attention_map,
    ops.AttentionMapRelative: attention_map_relative,
    ops.CausalConv: causal_conv, ops.SelectiveScan: selective_scan, ops.DualScan: dual_scan, ops.GatedDeltaScan: gated_delta_scan,
    ops.LinearScan: linear_scan,
}  # fmt: skip
