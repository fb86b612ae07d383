"""Recurrences against the reference backend in float64, and to the bit against themselves in other cuts, batches and buckets."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hasten.backends.cuda.kernels import cache, chunks, dual_scan, linear_scan, pointwise, scans
from hasten.backends.cuda.kernels.states import Sequences, StatePool
from hasten.program import ops
from tests.ops.test_reference_ops import Case, conv, data_of, delta, dual, run, selective, spread, tensors_of
from tests.ops.test_reference_ops import linear_scan as linear

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN

LENGTHS, STARTS = (5, 1, 2), (0, 7, 3)
"""From the beginning, decoded, and going on with a few."""
CHUNK = 16
"""Positions of a chunk here, where there are chunks: the least that a device's products take. Who is cut has some of twice as many."""
ACROSS = {"lengths": (2 * CHUNK + 5, 1, CHUNK), "starts": (0, 2 * CHUNK, CHUNK)}
"""Whole chunks and a piece, decoded as the first of a chunk, and one chunk alone, behind which the state is the reference's."""
SMALL = {
    ops.CausalConv: {"channels": 8, "rows": 2}, ops.SelectiveScan: {"channels": 4},
    ops.DualScan: {"features": 16, "chunk": CHUNK}, ops.GatedDeltaScan: {"values": 4}, ops.LinearScan: {"values": 16, "chunk": CHUNK},
}  # fmt: skip
"""Blocks that small cases have several of."""
CASES = [
    conv("odd", 13, 4, True, "silu", lengths=LENGTHS, starts=STARTS),
    conv("two taps", 8, 2, False, None, lengths=LENGTHS, starts=STARTS),
    conv("three taps", 9, 3, True, "gelu", lengths=LENGTHS, starts=STARTS),
    conv("one tap", 3, 1, False, "silu", lengths=LENGTHS, starts=STARTS),
    conv("more taps than rows", 5, 6, False, None, lengths=LENGTHS, starts=STARTS),
    selective("odd", 7, 5, lengths=LENGTHS, starts=STARTS),
    selective("one", 1, 1, lengths=LENGTHS, starts=STARTS),
    selective("far", 6, 16, lengths=LENGTHS, starts=STARTS, fill={"dt": spread(12.0), "a_log": spread(2.0)}),
    dual("groups", 4, 7, 3, 2, **ACROSS),
    dual("limits", 3, 5, 12, 3, 0.4, 0.9, **ACROSS),
    dual("one feature", 2, 1, 9, 1, **ACROSS),
    dual("forgets", 2, 3, 4, 1, **ACROSS, fill={"dt": spread(12.0), "a_log": spread(3.0)}),
    dual("wide", 2, 21, 9, 1, **ACROSS),
    delta("shared keys", 2, 6, 7, 5, lengths=LENGTHS, starts=STARTS),
    delta("odd", 3, 3, 12, 9, lengths=LENGTHS, starts=STARTS),
    delta("one", 1, 1, 1, 1, lengths=LENGTHS, starts=STARTS),
    linear("shared keys", 6, 2, 5, 7, **ACROSS),
    linear("wide", 2, 1, 5, 19, **ACROSS),
    linear("one", 1, 1, 1, 1, **ACROSS),
    linear("nothing in common", 2, 1, 12, 3, **ACROSS, fill={"q": spread(300.0), "k": spread(300.0)}),
]
CUT = (7, 1, 4)
CUT_ACROSS = (4 * CHUNK + 3, 1, 2 * CHUNK + 4)
LONGER = [
    conv("cut", 9, 4, True, "silu", lengths=CUT), selective("cut", 6, 5, lengths=CUT), delta("cut", 1, 1, 5, 6, lengths=CUT),
    dual("cut", 2, 6, 5, 1, lengths=CUT_ACROSS), linear("cut", 2, 1, 5, 6, lengths=CUT_ACROSS),
]  # fmt: skip
PAGES = 7


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows ``begin`` to ``end`` of a sequence of the case, whose state is in ``page``."""

    sequence: int
    begin: int
    end: int
    page: int


class Player:
    """The op of a case over a pool of its own, of two layers, NaN but for what sequences had kept before the case."""

    def __init__(self, case: Case, device, dtype=torch.float32, blocks=None):
        self.case, self.device, self.blocks = case, device, blocks or {}
        rounded = tensors_of(data_of(case), dtype)
        self.exact = {name: tensor.double() for name, tensor in rounded.items()}
        self.inputs = {name: rounded[f"in:{name}"] for name in case.inputs}
        self.weights = {name: rounded[f"w:{name}"].to(device) for name in case.weights}
        self.offsets, self.starts = np.r_[0, np.cumsum(case.lengths)], case.starts or (0,) * len(case.lengths)
        plain = {ops.DualScan: dual_scan.CHUNK, ops.LinearScan: linear_scan.CHUNK}
        self.chunk = self.blocks.get("chunk", plain.get(type(case.op), 1))
        self.at_once = set()  # rows that were asked for at once
        self.pool = StatePool.of(2, PAGES, (self.page_numbers(dtype.itemsize),), device)
        self.pool.pages.fill_(float("nan"))
        for sequence in range(len(case.lengths)):
            if f"s:{sequence}:0" in rounded:
                kept = rounded[f"s:{sequence}:0"].flatten().float()
                self.pool.pages[1, self.page_of(sequence), : len(kept)] = kept

    def page_numbers(self, row_bytes):
        """Of float32, in a page."""
        op, shape = self.case.op, self.case.group.shape
        match op:
            case ops.DualScan():
                return dual_scan.dual_numbers(shape[0], shape[1], op.groups, shape[2], row_bytes, self.chunk)
            case ops.LinearScan():
                return linear_scan.linear_numbers(op.kv_heads, op.head_dim, op.value_dim, row_bytes, self.chunk)
        return int(np.prod(shape))

    def page_of(self, sequence):
        """Where a sequence's state is unless a step says otherwise."""
        return (5, 2, 3)[sequence]

    def step(self, parts, rows=0, sequences=0, padding_page=-1):
        """What a step gives for its parts, in a bucket of so many rows and sequences at least."""
        picked = np.concatenate([np.arange(self.offsets[p.sequence] + p.begin, self.offsets[p.sequence] + p.end) for p in parts])
        positions = np.concatenate([self.starts[p.sequence] + np.arange(p.begin, p.end) for p in parts])
        offsets = np.cumsum([0, *(p.end - p.begin for p in parts)])
        count = max(rows, len(picked))
        more = max(0, sequences - len(parts))
        given = (
            np.pad(positions, (0, count - len(picked))), np.pad(offsets, (0, more), mode="edge"),
            np.pad([p.page for p in parts], (0, more), constant_values=padding_page),
        )  # fmt: skip
        step = Sequences(*(torch.from_numpy(x.astype(np.int32)).to(self.device) for x in given))
        self.at_once.add(chunks.rows_at_once(count, len(step.states), self.chunk))
        widths = [x.shape[1] for x in self.inputs.values()]
        wide = torch.full((count, sum(widths) + 3), float("nan"), dtype=next(iter(self.inputs.values())).dtype)
        wide[: len(picked), 3:] = torch.cat([x[picked] for x in self.inputs.values()], dim=1)
        inputs = wide.to(self.device)[:, 3:].split(widths, dim=1)  # side by side, as a fused projection leaves them
        y = torch.full((count, self.width(widths)), float("nan"), dtype=wide.dtype, device=self.device)
        self.launch(inputs, y, self.pool.layer(1), step)
        assert (y[len(picked) :] == 0).all()
        return torch.split(y[: len(picked)].cpu(), np.diff(offsets).tolist())

    def width(self, widths):
        op = self.case.op
        match op:
            case ops.GatedDeltaScan():
                return widths[2]
            case ops.LinearScan():
                return op.heads * op.value_dim
        return widths[0]

    def launch(self, inputs, y, state, step):
        op, weights = self.case.op, list(self.weights.values())
        match op:
            case ops.CausalConv():
                bias = weights[1] if op.bias else None
                scans.causal_conv(*inputs, weights[0], y, state, step, bias=bias, activation=op.activation, **self.blocks)
            case ops.SelectiveScan():
                scans.selective_scan(*inputs, *weights, y, state, step, **self.blocks)
            case ops.DualScan():
                limits = {"dt_min": op.dt_min, "dt_max": op.dt_max}
                dual_scan.dual_scan(*inputs, *weights, y, state, step, heads=op.heads, groups=op.groups, **limits, **self.blocks)
            case ops.GatedDeltaScan():
                heads = {"key_heads": op.key_heads, "value_heads": op.value_heads}
                scans.gated_delta_scan(*inputs, *weights, y, state, step, **heads, **self.blocks)
            case ops.LinearScan():
                totals = torch.full((len(y), op.heads), float("nan"), device=self.device)
                linear_scan.linear_scan(*inputs, y, totals, state, step, heads=op.heads, kv_heads=op.kv_heads, **self.blocks)

    def all(self):
        """Every sequence whole, in its own page."""
        return [Part(s, 0, length, self.page_of(s)) for s, length in enumerate(self.case.lengths)]

    def kept(self, page):
        """The state, as it was where the last full chunk ended."""
        return self.pool.pages[1, page, : int(np.prod(self.case.group.shape))].clone().cpu()

    def moved_on(self, sequence):
        """Was a row of the case the last of a chunk, and none behind it?"""
        return (self.starts[sequence] + self.case.lengths[sequence]) % self.chunk == 0


def near(got, want, tolerance):
    assert got.isfinite().all()
    if want.numel():
        worst = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert worst <= tolerance, f"off by {worst:.1e}, {tolerance:.0e} allowed"


def same_bits(one, other):
    one, other = (torch.cat(list(x)).float() for x in (one, other))
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_and_states_are_the_references(case, device):
    player = Player(case, device, blocks=SMALL[type(case.op)])
    want, tolerance = run(case, player.exact), case.op.contract.tolerance[0]
    y = torch.cat(player.step(player.all(), rows=13, sequences=5))
    near(y, want["y"], tolerance)
    pages = [part.page for part in player.all()]
    assert any(map(player.moved_on, range(len(pages))))
    for sequence, page in enumerate(pages):
        kept = want[f"after:{sequence}:0"].flatten()
        if not player.moved_on(sequence):
            continue
        near(player.kept(page), kept, 0 if isinstance(case.op, ops.CausalConv) else tolerance)
    others = [page for page in range(PAGES) if page not in pages]
    assert player.pool.pages[1, others].isnan().all()
    assert player.pool.pages[0].isnan().all()


@pytest.mark.parametrize("case", [case for case in CASES if "odd" in case.id or "shared" in case.id or "groups" in case.id], ids=str)
def test_bfloat16_rows_go_through_float32(case, device):
    """Inputs, weights and y in bf16, blocks as for a device: the state is as good as of float32, nothing being rounded on its way."""
    blocks = SMALL[type(case.op)]
    player = Player(case, device, torch.bfloat16, {"chunk": blocks["chunk"]} if "chunk" in blocks else None)
    want = run(case, player.exact)
    y = torch.cat(player.step(player.all()))
    near(y, want["y"], case.op.contract.tolerance[1])
    moved_on = [part for part in player.all() if player.moved_on(part.sequence)]
    assert moved_on
    for part in moved_on:
        near(player.kept(part.page), want[f"after:{part.sequence}:0"].flatten(), case.op.contract.tolerance[0])


@pytest.mark.parametrize("case", LONGER, ids=str)
def test_the_same_bits_however_cut(case, device):
    blocks = dict(SMALL[type(case.op)])
    if "chunk" in blocks:
        blocks["chunk"] *= 2
    player = Player(case, device, blocks=blocks)
    whole, lengths = player.step(player.all()), case.lengths
    states = [player.kept(part.page) for part in player.all()]
    assert states[0].isfinite().all()
    at_once = player.at_once

    other = Player(case, device, blocks=blocks)
    for part in other.all():  # alone, in another page
        page = 6 - part.page
        assert same_bits(other.step([dataclasses.replace(part, page=page)]), [whole[part.sequence]])
        assert same_bits([other.kept(page)], [states[part.sequence]])

    rng = np.random.default_rng(3)  # in pieces, beside whoever has rows left, in a bucket of another size
    player, done, rows, steps = Player(case, device, blocks=blocks), [0, 0, 0], [[], [], []], 0
    most = max(4, player.chunk + 4)
    while any(at < length for at, length in zip(done, lengths)):
        waiting = [s for s in rng.permutation(3).tolist() if done[s] < lengths[s]]
        parts = []
        for s in waiting[: 1 + steps % 2]:
            parts.append(Part(s, done[s], done[s] + int(rng.integers(1, min(most, lengths[s] - done[s]) + 1)), player.page_of(s)))
        for part, y in zip(parts, player.step(parts, rows=5 + steps, sequences=steps % 4)):
            rows[part.sequence].append(y)
            done[part.sequence] = part.end
        steps += 1
    assert steps > 3
    if player.chunk > 1:
        assert player.at_once | at_once == {chunks.FEW, player.chunk}
    assert all(same_bits(pieces, [whole[s]]) for s, pieces in enumerate(rows))
    assert all(same_bits([player.kept(part.page)], [states[part.sequence]]) for part in player.all())


@pytest.mark.parametrize("case", [case for case in LONGER if "chunk" in SMALL[type(case.op)]], ids=str)
def test_decoded_rows_have_the_bits_of_a_prompts(case, device):
    """One by one across the end of a chunk, from what a prompt left: a state that is read and, but for one row, not written."""
    blocks, length = SMALL[type(case.op)], 2 * CHUNK + 3
    whole = Player(case, device, blocks=blocks).step([Part(0, 0, length, 1)])[0]
    player = Player(case, device, blocks=blocks)
    rows, states = [*player.step([Part(0, 0, CHUNK + 7, 1)])], [player.kept(1)]
    for at in range(CHUNK + 7, length):
        rows += player.step([Part(0, at, at + 1, 1)])
        states.append(player.kept(1))
    assert same_bits(rows, [whole])
    written = [not torch.equal(one, other) for one, other in itertools.pairwise(states)]
    assert [at for at, moved in enumerate(written, CHUNK + 7) if moved] == [2 * CHUNK - 1]


@pytest.mark.parametrize("case", LONGER, ids=str)
def test_a_nan_stays_with_its_sequence(case, device):
    """And, where rows go one by one, with those behind it."""
    player = Player(case, device)
    for x in player.inputs.values():
        x[1] = float("nan")
    first, other = player.step([Part(0, 0, 2, 1), Part(2, 0, 1, 0)])
    assert first[1].isnan().all()
    assert player.chunk > 1 or first[0].isfinite().all()
    behind, beside = player.step([Part(0, 2, 3, 1), Part(2, 1, 2, 0)])
    assert behind.isnan().any()
    assert other.isfinite().all()
    assert beside.isfinite().all()


@pytest.mark.parametrize("case", LONGER, ids=str)
def test_who_has_no_page_or_no_rows_changes_no_state(case, device):
    """Rows without a page become zeros; a sequence of no rows, in a page, is left as it is."""
    player = Player(case, device)
    y = player.step([Part(2, 0, 2, -1), Part(0, 0, 1, 4)], rows=6, sequences=4, padding_page=1)
    assert (y[0] == 0).all()
    assert player.pool.pages[1, 4].isfinite().any()
    assert player.chunk > 1 or player.kept(4).isfinite().all()
    assert player.pool.pages[1, [0, 1, 2, 3, 5, 6]].isnan().all()


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4)])
def test_pages_of_states_move_as_those_of_a_cache(shape, device):
    rng = np.random.default_rng(1)
    pool, outside = (StatePool.of(2, count, shape, device) for count in (4, 3))
    for x in (pool.pages, outside.pages):
        x.copy_(torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32)))
    want = torch.cat([pool.pages, outside.pages], dim=1).cpu()
    moves = [(0, 2), (2, 4 + 1), (-1, 3), (4 + 1, 3), (4 + 2, 0)]
    for source, target in moves:
        if source >= 0:
            want[:, target] = want[:, source]
    cache.move_pages(pool, outside, torch.tensor(moves, dtype=torch.int32, device=device), words=8)
    assert torch.equal(torch.cat([pool.pages, outside.pages], dim=1).cpu(), want)


def test_a_step_reaches_one_layer_alone(device):
    pool = StatePool.of(3, 4, (2, 5), device)
    assert pool.pages.shape == (3, 4, 10)
    pool.layer(1).fill_(1.0)
    assert pool.pages.sum(dim=(1, 2)).tolist() == [0.0, 40.0, 0.0]


def test_what_does_not_go_together_is_refused(device):
    player = Player(LONGER[0], device)
    with pytest.raises(ValueError, match="3 × 9"):
        player.launch([torch.zeros(4, 9)], torch.zeros(4, 9), torch.zeros(PAGES, 28), None)
    with pytest.raises(ValueError, match="3 offsets"):
        Sequences(torch.zeros(4), torch.zeros(2), torch.zeros(2))


@triton.jit
def _softplus(x, y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y + at, pointwise.softplus(tl.load(x + at)))


def test_softplus_is_as_good_where_it_is_small(device):
    x = torch.cat([torch.linspace(-80, 80, 4093), torch.tensor([float("inf"), -float("inf"), float("nan")])]).to(device)
    y = torch.zeros_like(x)
    _softplus[(1,)](x, y, 4096)
    want = torch.logaddexp(x.double(), torch.zeros((), dtype=torch.float64, device=device))
    assert ((y - want).abs() / want)[:4093].max() < 5e-6  # exp has |x| half units in the last place by itself
    assert ((y - want).abs() / want)[x.abs() < 5].max() < 5e-7
    assert y[4093:].tolist()[:2] == [float("inf"), 0.0]
    assert y[4095].isnan()
