"""The native decoder kernels at every instruction-set level of this machine, against plain float64 NumPy."""

import math
import zlib

import ml_dtypes
import numpy as np
import pytest

from hasten import _native
from hasten.formats.cache import ROW_FORMATS
from tests.ops import naive

FEATURES = _native.cpu_features()
HAS_AVX2 = all(FEATURES[part] for part in ("avx2", "fma", "f16c"))
HAS_AVX512 = HAS_AVX2 and all(FEATURES[f"avx512{part}"] for part in ("f", "bw", "vl", "dq"))
HAS_AMX = HAS_AVX512 and FEATURES["avx512_bf16"] and FEATURES["amx_bf16"] and _native.amx_granted()
HERE = {"generic": True, "avx2": HAS_AVX2, "avx512": HAS_AVX512, "amx": HAS_AMX}
ISAS = [pytest.param(isa, marks=() if here else pytest.mark.skip(f"needs {isa}")) for isa, here in HERE.items()]
LEVELS = pytest.mark.parametrize("isa", ISAS)
WIDTHS = (1, 3, 7, 8, 12, 15, 16, 17, 31, 64, 65, 80, 127, 256, 1000)


def random(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def poisoned(*shape):
    """Where an output goes: what a kernel leaves out stays NaN."""
    return np.full(shape, np.nan, dtype=np.float32)


def to_bf16(x):
    return np.asarray(x, dtype=np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(bits):
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


# --- rows in, norms, pointwise


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 45.25])
def test_embed(width, scale):
    rng = random("embed", width)
    table, tokens = to_bf16(normal(rng, 9, width)), np.array([8, 0, 3, 3, 1], dtype=np.int32)
    y = poisoned(5, width)
    _native.embed(table, tokens, scale, y)
    assert same_bits(y, from_bf16(table)[tokens].astype(np.float32) * np.float32(scale))
    _native.embed(table, tokens[:0], scale, y[:0])


@LEVELS
@pytest.mark.parametrize("group", WIDTHS)
@pytest.mark.parametrize(("spans", "whole", "offset"), [(1, False, 0.0), (3, False, 1.0), (3, True, 0.0), (2, True, 1.0)])
def test_rms_norm(isa, group, spans, whole, offset):
    """Within 2e-6 of itself."""
    rng = random("rms", group, spans)
    x = normal(rng, 5, group * spans, scale=3)
    weight = normal(rng, group * spans if whole else group)
    x64, factor = x.astype(np.float64).reshape(5, spans, group), offset + weight.astype(np.float64).reshape(-1, group)
    expected = (x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * factor).reshape(x.shape)
    y = poisoned(*x.shape)
    _native.rms_norm(isa, x, weight, group, 1e-5, offset, y)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-6)
    one_by_one = poisoned(*x.shape)
    for row in range(5):
        _native.rms_norm(isa, x[row : row + 1], weight, group, 1e-5, offset, one_by_one[row : row + 1])
    assert same_bits(one_by_one, y)
    in_place = x.copy()
    _native.rms_norm(isa, in_place, weight, group, 1e-5, offset, in_place)
    assert same_bits(in_place, y)


@LEVELS
@pytest.mark.parametrize("group", WIDTHS)
@pytest.mark.parametrize(("spans", "whole", "biased"), [(1, False, True), (3, False, False), (3, True, True)])
def test_layer_norm(isa, group, spans, whole, biased):
    """Within 2e-6 of the spread of a normed row."""
    rng = random("layer", group, spans)
    x = normal(rng, 4, group * spans, scale=3) + np.float32(2)
    weight = normal(rng, group * spans if whole else group)
    bias = normal(rng, len(weight)) if biased else None
    x64 = x.astype(np.float64).reshape(4, spans, group)
    apart = x64 - x64.mean(-1, keepdims=True)
    expected = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(np.float64).reshape(-1, group)
    expected += 0 if bias is None else bias.astype(np.float64).reshape(-1, group)
    y = poisoned(*x.shape)
    _native.layer_norm(isa, x, weight, bias, group, 1e-5, y)
    np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=2e-6, atol=8e-6)


@LEVELS
@pytest.mark.parametrize("count", [0, *WIDTHS])
def test_add(isa, count):
    rng = random("add", count)
    a, b, y = normal(rng, count), normal(rng, count), poisoned(count)
    _native.add(isa, a, b, y)
    assert same_bits(y, a + b)
    _native.add(isa, a, b, a)
    assert same_bits(a, y)


GATES = np.concatenate([np.linspace(-12, 12, 4001), np.geomspace(1e-30, 80, 500), -np.geomspace(1e-30, 80, 500), [0.0, -0.0]]).astype(
    np.float32
)


@LEVELS
@pytest.mark.parametrize("activation", sorted(naive.POINTWISE))
def test_gate_values(isa, activation):
    """Within 1e-6 of itself, times x² / 4 in gelu's tail, where the exponent is rounded; below 1e-30 numbers may vanish."""
    if activation == "gelu":  # erfc, where 1 + erf would cancel
        expected = [float(x) * 0.5 * math.erfc(-float(x) / math.sqrt(2)) for x in GATES]
    elif activation == "gelu_tanh":
        twice = [2 * math.sqrt(2 / math.pi) * (float(x) + 0.044715 * float(x) ** 3) for x in GATES]
        expected = [float(x) / (1 + math.exp(-t)) if t > -700 else 0.0 for x, t in zip(GATES, twice)]
    else:
        expected = [naive.POINTWISE[activation](float(x)) for x in GATES]
    y = poisoned(len(GATES))
    _native.gate(isa, activation, GATES, np.ones_like(GATES), y)
    expected = np.array(expected)
    near = 1e-6 * np.maximum(1, GATES.astype(np.float64) ** 2 / 4 if activation.startswith("gelu") else 1)
    assert (np.abs(y - expected) <= near * np.abs(expected) + 1e-30).all()


@LEVELS
@pytest.mark.parametrize("activation", sorted(naive.POINTWISE))
def test_gate_shapes(isa, activation):
    rng = random("gate")
    gate, up = normal(rng, 1000, scale=3), normal(rng, 1000)
    y, whole = poisoned(1000), poisoned(1000)
    _native.gate(isa, activation, gate, np.ones_like(up), y)
    _native.gate(isa, activation, gate, up, whole)
    assert same_bits(whole, y * up)
    for count in (0, *WIDTHS):
        part = poisoned(count)
        _native.gate(isa, activation, gate[:count], up[:count], part)
        assert same_bits(part, whole[:count])
    _native.gate(isa, activation, gate, up, gate)
    assert same_bits(gate, whole)


@LEVELS
@pytest.mark.parametrize("activation", sorted(naive.POINTWISE))
def test_gate_of_what_is_no_number(isa, activation):
    gate = np.array([np.nan, np.inf, 1e30] * 7, dtype=np.float32)
    y = poisoned(len(gate))
    _native.gate(isa, activation, gate, np.ones_like(gate), y)
    assert np.isnan(y[::3]).all()
    top = 1.0 if activation in {"sigmoid", "tanh"} else np.inf
    assert (y[1::3] == top).all()
    assert not np.isnan(y[2::3]).any()


@LEVELS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "start", "dims"),
    [(1, 2, 0, 2), (3, 12, 0, 12), (2, 80, 0, 32), (4, 96, 0, 96), (2, 192, 128, 64), (1, 256, 3, 30), (5, 64, 0, 64), (2, 8, 0, 0)],
)
def test_rotate(isa, interleaved, heads, head_dim, start, dims):
    """Within 2e-7 of the larger of a pair."""
    rng = random("rotate", heads, head_dim)
    x, angles = normal(rng, 6, heads * head_dim), rng.uniform(0, 500, (6, dims // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected = x.astype(np.float64).reshape(6, heads, head_dim)
    before = expected.copy()
    for i in range(dims // 2):
        a, b = (start + 2 * i, start + 2 * i + 1) if interleaved else (start + i, start + i + dims // 2)
        c, s = cos[:, i, None].astype(np.float64), sin[:, i, None].astype(np.float64)
        expected[:, :, a] = before[:, :, a] * c - before[:, :, b] * s
        expected[:, :, b] = before[:, :, b] * c + before[:, :, a] * s
    y = poisoned(*x.shape)
    _native.rotate(isa, x, heads, start, dims, interleaved, cos, sin, y)
    np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=0, atol=1e-6)
    untouched = np.ones(head_dim, dtype=bool)
    untouched[start : start + dims] = False
    assert np.array_equal(y.reshape(6, heads, head_dim)[..., untouched], x.reshape(6, heads, head_dim)[..., untouched])
    _native.rotate(isa, x, heads, start, dims, interleaved, cos, sin, x)
    assert same_bits(x, y)


# --- a paged cache


FORMATS = {"bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}
CACHES = pytest.mark.parametrize("form", FORMATS)
POISON = 0xFF  # a byte of which NaNs are made: in bf16, in fp8 and in a scale


def page_bytes(form, page, kv_heads, key_dim, value_dim):
    rows = ROW_FORMATS[FORMATS[form]]
    return page * kv_heads * (rows.row_bytes(key_dim) + rows.row_bytes(value_dim))


def empty_cache(form, pages, page, kv_heads, key_dim, value_dim, extra=0):
    return np.full((pages, page_bytes(form, page, kv_heads, key_dim, value_dim) + extra), POISON, dtype=np.uint8)


def parts_of(form, cache, page, kv_heads, key_dim, value_dim):
    """Views of the bytes of every page's keys [pages, kv_heads, page, …], values and, where there are such, their scales."""
    rows = ROW_FORMATS[FORMATS[form]]
    widths = [rows.dtype.itemsize * key_dim, rows.dtype.itemsize * value_dim, *([] if form == "bf16" else [2, 2])]
    heads = cache[:, : page_bytes(form, page, kv_heads, key_dim, value_dim)].reshape(len(cache), kv_heads, -1)
    ends = np.cumsum([page * width for width in widths])
    return [heads[..., end - page * width : end].reshape(len(cache), kv_heads, page, width) for width, end in zip(widths, ends)]


def as_bytes(array):
    array = np.ascontiguousarray(array)
    return array.view(np.uint8).reshape(*array.shape[:-1], -1)


def kept(form, x, heads):
    """What the cache's format stands for: float64 [tokens, heads, dim] of x [tokens, heads · dim]."""
    rows = ROW_FORMATS[FORMATS[form]]
    return rows.decode(*rows.encode(x.reshape(len(x), heads, -1))).astype(np.float64)


@CACHES
@pytest.mark.parametrize(
    ("page", "kv_heads", "key_dim", "value_dim"), [(16, 1, 12, 12), (64, 3, 64, 80), (48, 2, 9, 8), (5, 3, 33, 7), (16, 2, 1, 3)]
)
def test_append_kv(form, page, kv_heads, key_dim, value_dim):
    """Bit for bit the numpy codec, whatever the numbers; nothing else of a page is touched."""
    rng = random("append", page)
    cache = empty_cache(form, 40, page, kv_heads, key_dim, value_dim, extra=8)
    slots = rng.permutation(40 * page)[:150].astype(np.int64)
    k, v = normal(rng, 150, kv_heads * key_dim), normal(rng, 150, kv_heads * value_dim)
    k *= np.geomspace(1e-44, 1e36, 150, dtype=np.float32)[:, None]
    v *= np.concatenate([np.geomspace(1e36, 1e-44, 60), np.geomspace(1e-9, 1e9, 90)]).astype(np.float32)[:, None]  # a float16's range
    ties = np.concatenate([np.arange(-127, 127.5, 0.5), np.arange(-448, 448.5, 0.5), np.arange(-8, 8, 0.0625) / 64]).astype(np.float32)
    k[:100] = rng.choice(ties, k[:100].shape)  # half way between neighbours, where the largest is the format's
    k[:50, 0], k[50:100, 0] = 127, -448
    v[50, 0], v[51, -1], v[52, 0], v[53], v[54] = np.nan, -np.inf, -0.0, 0.0, 3.4028235e38
    _native.append_kv(cache, form, page, kv_heads, k, v, slots)
    expected = empty_cache(form, 40, page, kv_heads, key_dim, value_dim, extra=8)
    parts = parts_of(form, expected, page, kv_heads, key_dim, value_dim)
    rows = ROW_FORMATS[FORMATS[form]]
    encoded = [rows.encode(x.reshape(150, kv_heads, -1)) for x in (k, v)]
    for part, made in zip(parts, [*(elements for elements, _ in encoded), *(scales for _, scales in encoded if scales is not None)]):
        for row, slot in enumerate(slots):
            part[slot // page, :, slot % page] = as_bytes(made[row])
    if form == "bf16":  # which NaN is not said
        whole = slice(0, page_bytes(form, page, kv_heads, key_dim, value_dim))
        cache, expected = (np.nan_to_num(from_bf16(part[:, whole].copy()), nan=7.5e7) for part in (cache, expected))
    assert np.array_equal(cache, expected)
    assert np.isfinite(kept(form, k[:100], kv_heads)).all()
    assert np.isnan(kept(form, v, kv_heads)[50, 0, 0])


class Sequence:
    """The cache of one sequence of ``length`` tokens, in shuffled pages among poisoned others, and its queries at every position."""

    def __init__(
        self,
        *,
        length,
        heads,
        kv_heads,
        key_dim,
        value_dim=None,
        page=16,
        window=0,
        softcap=0.0,
        slopes=False,
        sinks=False,
        loud=1.0,
        form="bf16",
    ):
        self.rng = random(length, heads, kv_heads, key_dim, value_dim, page, window)
        self.length, self.heads, self.kv_heads, self.key_dim, self.page = length, heads, kv_heads, key_dim, page
        self.value_dim = value_dim or key_dim
        self.form = form
        self.loud, self.window, self.softcap, self.scale = loud, window, softcap, loud / math.sqrt(key_dim)
        used = -(-length // page)
        self.cache = empty_cache(form, used + 3, page, kv_heads, key_dim, self.value_dim, extra=16)
        self.table = self.rng.permutation(used + 3)[:used].astype(np.int32)
        self.k, self.v = normal(self.rng, length, kv_heads * key_dim), normal(self.rng, length, kv_heads * self.value_dim)
        self.q = normal(self.rng, length, heads * key_dim)
        self.slopes = np.geomspace(0.5, 0.01, heads).astype(np.float32) if slopes else None
        self.sinks = normal(self.rng, heads, scale=2) if sinks else None
        self.append(0, length)

    def append(self, begin, end):
        slots = np.array([int(self.table[t // self.page]) * self.page + t % self.page for t in range(begin, end)], dtype=np.int64)
        _native.append_kv(self.cache, self.form, self.page, self.kv_heads, self.k[begin:end], self.v[begin:end], slots)

    def attend(self, isa, begin, end, *, chunk=0, cache=None, table=None):
        y = poisoned(end - begin, self.heads * self.value_dim)
        _native.attend(
            isa, self.cache if cache is None else cache, self.form, self.page, self.kv_heads, self.key_dim, self.value_dim,
            self.table if table is None else table, self.q[begin:end], begin, self.scale, y,
            window=self.window, softcap=self.softcap, slopes=self.slopes, sinks=self.sinks, chunk=chunk,
        )  # fmt: skip
        return y

    def expected(self, isa):
        """Softmax attention written plainly, over what the cache kept of keys and values (and bf16 of queries where tiles are of bf16)."""
        q = (from_bf16(to_bf16(self.q)) if isa == "amx" else self.q.astype(np.float64)).reshape(self.length, self.heads, self.key_dim)
        k, v = kept(self.form, self.k, self.kv_heads), kept(self.form, self.v, self.kv_heads)
        y = np.zeros((self.length, self.heads, self.value_dim))
        for head in range(self.heads):
            shared = head // (self.heads // self.kv_heads)
            for at in range(self.length):
                oldest = max(0, at - self.window + 1) if self.window else 0
                scores = k[oldest : at + 1, shared] @ q[at, head] * self.scale
                if self.softcap:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                if self.slopes is not None:
                    scores = scores + float(self.slopes[head]) * np.arange(oldest - at, 1)
                top = scores.max() if self.sinks is None else max(scores.max(), float(self.sinks[head]))
                weights = np.exp(scores - top)
                total = weights.sum() + (0 if self.sinks is None else math.exp(float(self.sinks[head]) - top))
                y[at, head] = weights @ v[oldest : at + 1, shared] / total
        return y.reshape(self.length, -1)


SEQUENCES = {
    "one token": {"length": 1, "heads": 4, "kv_heads": 2, "key_dim": 64},
    "63 tokens": {"length": 63, "heads": 4, "kv_heads": 1, "key_dim": 12},
    "64 tokens": {"length": 64, "heads": 3, "kv_heads": 3, "key_dim": 80, "page": 64},
    "65 tokens": {"length": 65, "heads": 6, "kv_heads": 2, "key_dim": 96, "page": 32},
    "200 tokens": {"length": 200, "heads": 8, "kv_heads": 1, "key_dim": 64, "page": 64},
    "200 tokens of one head": {"length": 200, "heads": 1, "kv_heads": 1, "key_dim": 256},
    "17 heads": {"length": 70, "heads": 17, "kv_heads": 1, "key_dim": 32},
    "150 heads": {"length": 20, "heads": 150, "kv_heads": 1, "key_dim": 16},
    "odd dims": {"length": 130, "heads": 2, "kv_heads": 1, "key_dim": 33, "value_dim": 7},
    "narrow values": {"length": 130, "heads": 4, "kv_heads": 2, "key_dim": 192, "value_dim": 128, "page": 64},
    "wide values": {"length": 70, "heads": 4, "kv_heads": 2, "key_dim": 40, "value_dim": 112},
    "pages of 48": {"length": 200, "heads": 4, "kv_heads": 2, "key_dim": 64, "page": 48},
    "pages of 5": {"length": 100, "heads": 4, "kv_heads": 2, "key_dim": 64, "page": 5},
    "pages of 256": {"length": 300, "heads": 2, "kv_heads": 1, "key_dim": 64, "page": 256},
    "window 1": {"length": 130, "heads": 2, "kv_heads": 1, "key_dim": 64, "window": 1},
    "window 17": {"length": 200, "heads": 4, "kv_heads": 2, "key_dim": 64, "window": 17},
    "window 64": {"length": 200, "heads": 4, "kv_heads": 2, "key_dim": 80, "window": 64, "page": 64},
    "window 100": {"length": 200, "heads": 4, "kv_heads": 1, "key_dim": 64, "window": 100, "sinks": True},
    "window of everything": {"length": 70, "heads": 4, "kv_heads": 1, "key_dim": 64, "window": 2**31 - 1},
    "softcap": {"length": 130, "heads": 4, "kv_heads": 2, "key_dim": 64, "softcap": 2.0, "loud": 3.0},
    "slopes": {"length": 130, "heads": 6, "kv_heads": 6, "key_dim": 64, "slopes": True},
    "sinks": {"length": 130, "heads": 16, "kv_heads": 2, "key_dim": 64, "sinks": True},
    "all at once": {
        "length": 130, "heads": 4, "kv_heads": 2, "key_dim": 48, "window": 33, "softcap": 5.0, "slopes": True, "sinks": True, "loud": 4.0,
    },
    "loud scores": {"length": 130, "heads": 4, "kv_heads": 2, "key_dim": 64, "loud": 30.0},
}  # fmt: skip
EVERY_SEQUENCE = pytest.mark.parametrize("case", SEQUENCES)


@LEVELS
@EVERY_SEQUENCE
@CACHES
def test_attend(isa, case, form):
    """Within 1e-5 of values of size 1 in float32, times the size of the scores; within 1e-2 where tiles round weights to bf16."""
    sequence = Sequence(**SEQUENCES[case], form=form)
    y = sequence.attend(isa, 0, sequence.length)
    np.testing.assert_allclose(y, sequence.expected(isa), rtol=0, atol=1e-2 if isa == "amx" else 1e-5 * max(1.0, sequence.loud))


@LEVELS
@EVERY_SEQUENCE
@CACHES
def test_attend_gives_the_same_bits_however_rows_are_chunked(isa, case, form):
    sequence = Sequence(**SEQUENCES[case], form=form)
    n = sequence.length
    whole = sequence.attend(isa, 0, n)
    assert not np.isnan(whole).any()
    for chunk in (1, 16):
        assert same_bits(sequence.attend(isa, 0, n, chunk=chunk), whole)
    for _ in range(2):
        cuts = [0, *sorted(sequence.rng.integers(0, n + 1, 4).tolist()), n]
        for begin, end in zip(cuts, cuts[1:]):
            if begin < end:
                assert same_bits(sequence.attend(isa, begin, end), whole[begin:end])


@LEVELS
@EVERY_SEQUENCE
@CACHES
def test_attend_looks_at_nothing_that_is_not_yet_or_no_longer_there(isa, case, form):
    """A row's bits when it is the newest token, later slots hold NaN, and pages that its window has left are given away."""
    sequence = Sequence(**SEQUENCES[case], form=form)
    whole = sequence.attend(isa, 0, sequence.length)
    for at in {0, 1, 15, 16, 62, 63, 64, 100, 127, 128, sequence.length - 1}:
        if at >= sequence.length:
            continue
        cache, table = sequence.cache.copy(), sequence.table[: at // sequence.page + 1].copy()
        oldest = max(0, at - sequence.window + 1) if sequence.window else 0
        for part in parts_of(form, cache, sequence.page, sequence.kv_heads, sequence.key_dim, sequence.value_dim):
            for t in [*range(oldest), *range(at + 1, sequence.length)]:
                part[sequence.table[t // sequence.page], :, t % sequence.page] = POISON
        table[: oldest // sequence.page] = -(2**20)
        y = sequence.attend(isa, at, at + 1, cache=cache, table=table)
        assert same_bits(y, whole[at : at + 1])


@LEVELS
def test_attend_where_other_sequences_have_run_before(isa):
    """Neither a token's page nor what scratch memory held before changes bits."""
    sequence = Sequence(**SEQUENCES["pages of 48"])
    whole = sequence.attend(isa, 0, sequence.length)
    moved = sequence.rng.permutation(len(sequence.cache))
    cache = np.empty_like(sequence.cache)
    cache[moved] = sequence.cache
    assert same_bits(sequence.attend(isa, 0, sequence.length, cache=cache, table=moved[sequence.table].astype(np.int32)), whole)


def test_levels_agree():
    """Float32 levels are within rounding of one another."""
    sequence = Sequence(**SEQUENCES["all at once"])
    here = [isa for isa in ("generic", "avx2", "avx512") if HERE[isa]]
    results = [sequence.attend(isa, 0, sequence.length) for isa in here]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=2e-5)


# --- what is refused


def ones(*shape):
    return np.ones(shape, dtype=np.float32)


def attend_page(table, position, form="bf16"):
    cache, table = np.zeros((2, 128), np.uint8), np.array(table, np.int32)
    _native.attend("generic", cache, form, 8, 1, 4, 4, table, ones(1, 4), position, 1.0, ones(1, 4))


def append_at(slot, form="bf16", row=128):
    _native.append_kv(np.zeros((2, row), np.uint8), form, 8, 1, ones(1, 4), ones(1, 4), np.array([slot]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _native.add("sse9", ones(3), ones(3), ones(3)), "isa 'sse9' is not known"),
        (lambda: _native.add("generic", ones(3), ones(4), ones(3)), "a and b must"),
        (lambda: _native.gate("generic", "swish", ones(3), ones(3), ones(3)), "activation is 'swish'; accepted"),
        (lambda: _native.embed(np.zeros((3, 4), np.uint16), np.array([3], np.int32), 1.0, ones(1, 4)), "tokens must"),
        (lambda: _native.rms_norm("generic", ones(2, 6), ones(4), 4, 1e-5, 0.0, ones(2, 6)), "group must"),
        (lambda: _native.rms_norm("generic", ones(2, 6), ones(2), 3, 1e-5, 0.0, ones(2, 6)), "weight must"),
        (lambda: _native.rotate("generic", ones(2, 6), 1, 4, 4, False, ones(2, 2), ones(2, 2), ones(2, 6)), "start and dims"),
        (lambda: append_at(16), "slots must"),
        (lambda: attend_page([0], 8), "table must list"),
        (lambda: attend_page([2], 0), "table must name"),
        (lambda: attend_page([0], 0, "int5"), "cache format is 'int5'; accepted: bf16, int8, fp8"),
        (lambda: append_at(0, "int8", 8 * 4 * 2 + 8 * 2 * 2 - 1), "a row of cache must hold the"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)
