"""Attention over pages against the reference backend, and to the bit against itself in other company, other cuts and other splits."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels import attention as kernels
from hasten.backends.cuda.kernels.cache import GroupCache, append
from hasten.backends.reference import State, play
from hasten.program import Batch, KvGroup, LatentGroup, Layer, Program, StateRef, Value, ops
from hasten.spec import Causal, SegmentMemory, SlidingWindow
from tests.gpu.test_cache import poisoned

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # numpy's, of NaN

SMALL = kernels.Blocks(keys=16, part=32, lanes=16, values=16)
REF = StateRef("s", 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to attend."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    visible: object = Causal()
    form: str = "bfloat16"
    latent: bool = False
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    scale: float = 0.4

    def op(self):
        return ops.Attend(
            q="q", y="y", state=REF, sinks="sinks" if self.sinks else None, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.key_dim, value_dim=self.value_dim, scale=self.scale, visible=self.visible, softcap=self.softcap,
            slopes=self.slopes(),
        )  # fmt: skip

    def slopes(self):
        return tuple(0.5 ** (i + 1) for i in range(self.heads)) if self.alibi else None


CASES = {
    "grouped": Case(),
    "each its own, odd": Case(3, 3, 20, 12),
    "multi-query, more heads than lanes": Case(17, 1, 16, 5),
    "two pieces of a key": Case(2, 1, 72, 16),
    "window": Case(visible=SlidingWindow(size=7)),
    "window over parts": Case(visible=SlidingWindow(size=40)),
    "segments": Case(visible=SegmentMemory(segment=9, memory=20)),
    "sinks": Case(sinks=True),
    "all at once": Case(4, 2, 20, 12, SlidingWindow(size=37), "bfloat16", False, 2.0, True, True),
    "fp8": Case(form="fp8"),
    "int8, all at once": Case(4, 2, 20, 12, SlidingWindow(size=37), "int8", False, 2.0, True, True),
    "latent": Case(3, 1, 40, 24, latent=True),
    "latent, fp8": Case(3, 1, 24, 20, latent=True, form="fp8"),
}
LENGTHS, ASKED = (37, 2, 70, 1), (2, 2, 9, 1)
"""Tokens of every sequence, and how many of them, the last, ask."""


class World:
    """What a few sequences have kept, on shuffled pages of a cache that is NaN elsewhere, and their queries."""

    def __init__(self, case, device, dtype=torch.float32, lengths=LENGTHS, seed=0):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)

        self.case, self.device, self.dtype, self.lengths = case, device, dtype, lengths
        total = sum(lengths)
        self.offsets = np.r_[0, np.cumsum(lengths)]
        self.q = normal(total, case.heads * case.key_dim)
        self.k = normal(total, case.kv_heads * case.key_dim)
        self.v = None if case.latent else normal(total, case.kv_heads * case.value_dim)
        self.sinks = torch.from_numpy(rng.standard_normal(case.heads).astype(np.float32)) * 2
        self.most = -(-max(lengths) // 16) + 1
        self.lay(rng.permutation(len(lengths) * self.most))

    def lay(self, numbers):
        """Write everything to the pages ``numbers``."""
        case, count = self.case, len(self.lengths)
        self.pages = np.where(
            np.arange(self.most)[None] < -(-np.array(self.lengths) // 16)[:, None], numbers.reshape(count, self.most), -1
        ).astype(np.int32)
        form = (2, len(numbers), case.kv_heads, case.key_dim, None if case.latent else case.value_dim, case.form, self.device)
        self.cache = poisoned(GroupCache.of(*form)).layer(1)
        at = np.concatenate([np.arange(length) for length in self.lengths]).astype(np.int32)
        owner = np.repeat(np.arange(count), self.lengths).astype(np.int32)
        there = [torch.from_numpy(x).to(self.device) for x in (at, owner, self.pages)]
        v = None if self.v is None else self.v.to(self.device)
        append(self.k.to(self.device), v, self.cache, *there, rows=256)

    def want(self):
        """Every token's answer from the reference backend, [sum of lengths, H·value_dim]."""
        case = self.case
        kept = KvGroup("s", 1, case.kv_heads, case.key_dim, case.value_dim, case.visible, case.form)
        group = LatentGroup("s", 1, case.key_dim, case.value_dim, case.visible, case.form) if case.latent else kept
        given = {"q": self.q.float(), "k": self.k.float()} | ({} if case.latent else {"v": self.v.float()})
        listed = (ops.AppendKv(k="k", v=None if case.latent else "v", state=REF), case.op())
        program = Program(
            ops=listed, values={name: Value("T", (-1,), "float32") for name in (*given, "y")}, params={"sinks": (case.heads,)},
            states=(group,), layers=(Layer("all", 0, 2),), inputs=tuple(given), outputs=("y",), context=1 << 20,
        )  # fmt: skip
        batch = Batch.of([[0] * length for length in self.lengths])
        return play(program, {"sinks": self.sinks}, batch, State(len(self.lengths)), given=given)[0]["y"]

    def attend(self, rows, bucket=None, programs=0, blocks=SMALL):
        """Answers of ``rows`` [(sequence, begin, end), …], in their order, in a step of ``bucket`` rows; and the parts there were."""
        case = self.case
        picked = np.concatenate([self.offsets[s] + np.arange(begin, end) for s, begin, end in rows])
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in rows])
        sequence = np.concatenate([np.full(end - begin, s) for s, begin, end in rows])
        count = bucket or len(picked)
        pages = self.pages.copy()
        for s, begin, _ in rows:  # what no query of the step sees may be gone
            gone = [at for at in range(begin) if all(not sees(case.visible, query, at) for query in range(begin, self.lengths[s]))]
            pages[s, : len(gone) // 16] = -1
        q = torch.full((count, self.q.shape[1]), float("nan"), dtype=self.dtype)
        q[: len(picked)] = self.q[picked]
        y = torch.full((count, case.heads * case.value_dim), float("nan"), dtype=self.dtype, device=self.device)
        positions, sequence = (np.pad(x, (0, count - len(x)), constant_values=-1).astype(np.int32) for x in (positions, sequence))
        each = kernels.tile_rows(case.heads, case.kv_heads, blocks)
        tiles = kernels.tiles_of(sequence, each, kernels.most_tiles(count, len(self.lengths), each))
        parts = None
        if programs:
            numbers = kernels.Parts.numbers(count, case.heads, case.value_dim, max(self.lengths), blocks)
            room = torch.full((numbers,), float("nan"), device=self.device)
            parts = kernels.Parts.of(count, case.heads, case.value_dim, max(self.lengths), programs, room, blocks)
        kernels.attend(
            q.to(self.device), self.cache, y, *(torch.from_numpy(x).to(self.device) for x in (positions, sequence, pages, tiles)),
            heads=case.heads, scale=case.scale, visible=case.visible, softcap=case.softcap,
            slopes=torch.tensor(case.slopes(), device=self.device) if case.alibi else None,
            sinks=self.sinks.to(self.device) if case.sinks else None, parts=parts, blocks=blocks,
        )  # fmt: skip
        assert (y[len(picked) :] == 0).all()
        return y[: len(picked)].cpu(), parts

    def asked(self):
        return [(s, length - asked, length) for s, (length, asked) in enumerate(zip(self.lengths, ASKED))]

    def rows_of(self, rows):
        return np.concatenate([self.offsets[s] + np.arange(begin, end) for s, begin, end in rows])


def sees(visible, query, key):
    match visible:
        case SlidingWindow(size=size):
            return query - size < key <= query
        case SegmentMemory(segment=segment, memory=memory):
            return query // segment * segment - memory <= key <= query
    return key <= query


@pytest.mark.parametrize("case", CASES)
def test_float32_within_the_contract_for_float32(case, device):
    world = World(CASES[case], device)
    rows = world.asked()
    y, _ = world.attend(rows, bucket=16)
    want = world.want()[world.rows_of(rows)]
    assert (y - want).abs().max() <= ops.Attend.contract.tolerance[0] * want.abs().max()


@pytest.mark.parametrize("case", ["all at once", "int8, all at once", "fp8", "latent"])
def test_bfloat16_within_the_contract_for_bfloat16(case, device):
    world = World(CASES[case], device, torch.bfloat16)
    rows = world.asked()
    y, _ = world.attend(rows)
    want = world.want()[world.rows_of(rows)]
    assert (y.float() - want).abs().max() <= ops.Attend.contract.tolerance[1] * want.abs().max()


def test_blocks_of_the_size_that_a_device_takes(device):
    world = World(Case(4, 1, 64, 64, form="int8"), device, torch.bfloat16, lengths=(530, 30))
    rows = [(0, 527, 530), (1, 29, 30)]
    want = world.want()[world.rows_of(rows)]
    whole, _ = world.attend(rows, blocks=kernels.DEFAULT)
    split, parts = world.attend(rows, programs=2, blocks=kernels.DEFAULT)
    assert (whole.float() - want).abs().max() <= ops.Attend.contract.tolerance[1] * want.abs().max()
    assert torch.equal(whole, split)
    assert parts.maxima.shape[2] == 2


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("int8, all at once", torch.bfloat16), ("latent", torch.float32)],
)
def test_a_row_does_not_depend_on_the_step_it_is_in(case, dtype, device):
    world = World(CASES[case], device, dtype)
    rows = world.asked()
    together, _ = world.attend(rows)
    at = np.r_[0, np.cumsum(ASKED)]
    assert torch.equal(world.attend(rows, bucket=24)[0], together)  # another bucket
    mirrored, _ = world.attend(rows[::-1])  # another order
    assert torch.equal(torch.cat(list(mirrored.split(ASKED[::-1]))[::-1]), together)
    assert torch.equal(world.attend([rows[0]])[0], together[: at[1]])  # alone
    s, begin, end = rows[2]  # a prompt in pieces, one token of it as if it were decoded
    pieces = [world.attend([(s, begin, begin + 1)])[0], world.attend([(s, begin + 1, end), rows[0]])[0][: end - begin - 1]]
    assert torch.equal(torch.cat(pieces), together[at[2] : at[3]])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("all at once", torch.float32), ("latent, fp8", torch.bfloat16)],
)
def test_who_sums_a_part_changes_no_bit(case, dtype, device):
    world = World(CASES[case], device, dtype)
    rows = world.asked()
    whole, _ = world.attend(rows)
    split, parts = world.attend(rows, bucket=15, programs=2)
    assert torch.equal(split, whole)
    first = next(key for key in range(70) if sees(world.case.visible, 69, key))
    assert parts.maxima[2 + 2 + 8, 0, first // 32 :].isfinite().all()  # of the 70th token of the third sequence, in parts of 32
    assert first // 32 < 2
    assert torch.equal(world.attend(rows[2:], programs=5)[0], whole[2 + 2 :])


def test_where_pages_lie_changes_no_bit(device):
    world = World(CASES["all at once"], device, torch.bfloat16)
    rows = world.asked()
    before, pages = world.attend(rows)[0], world.pages
    world.lay(np.random.default_rng(9).permutation(pages.size))
    assert not np.array_equal(world.pages, pages)
    assert torch.equal(world.attend(rows)[0], before)


def test_a_maximum_that_rises_or_falls_from_part_to_part_changes_no_bit(device):
    """Scores that grow, and that fall, by hundreds along the context: everything before, or after, is scaled away."""
    world = World(Case(alibi=True), device, lengths=(70, 70))
    world.k[:70] *= torch.linspace(1, 200, 70)[:, None]
    world.k[70:] *= torch.linspace(200, 1, 70)[:, None]
    world.lay(np.arange(world.pages.size))
    rows = [(0, 67, 70), (1, 69, 70)]
    whole, want = world.attend(rows)[0], world.want()[world.rows_of(rows)]
    assert (whole - want).abs().max() <= 5e-4 * want.abs().max()  # scores near a thousand: float32 rounds them by 6e-5
    assert torch.equal(world.attend(rows, programs=3)[0], whole)


def test_a_nan_is_not_hidden(device):
    world = World(Case(), device)
    world.q[36, 0] = float("nan")  # of the first of four heads, of the last token of the first sequence
    y, _ = world.attend([(0, 34, 37)])
    assert y[2, :16].isnan().all()
    assert y[2, 16:].isfinite().all()
    assert y[:2].isfinite().all()


def test_tiles_hold_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 40, rng.integers(1, 9))
        padding = int(rng.integers(0, 20))
        sequence = np.r_[np.repeat(rng.permutation(len(lengths)), lengths), np.full(padding, -1)].astype(np.int32)
        each = int(rng.integers(1, 20))
        most = kernels.most_tiles(len(sequence), len(lengths), each)
        tiles = kernels.tiles_of(sequence, each, most)
        held = np.concatenate([np.arange(first, first + count) for first, count in tiles])
        assert np.array_equal(held, np.arange(len(sequence)))
        assert tiles[:, 1].max() <= each
        assert all(len(set(sequence[first : first + count])) <= 1 for first, count in tiles)
        for owner in set(sequence.tolist()):
            assert (sequence[tiles[tiles[:, 1] > 0, 0]] == owner).sum() == -(-(sequence == owner).sum() // each)


def test_what_is_refused_is_named():
    relative = ops.AttendRelative(
        q="q", y="y", position_weight="p", content_bias="u", position_bias="w", state=REF, heads=1, head_dim=2, width=2, scale=1.0,
        visible=Causal(),
    )  # fmt: skip
    assert "distance" in kernels.refusal(relative)
    assert kernels.refusal(Case().op()) is None
