"""Ops with recurrent state, each on a tape of its own at every instruction-set level, against the reference op in float64.

States begin as NaN, and so does all that a step writes to: whatever is read before it was written is seen."""

import dataclasses

import numpy as np
import pytest

from hasten import _native
from hasten.backends.cpu.compile import compile_program
from hasten.program import ops
from tests.ops.packing import all_packed
from tests.ops.test_native_row_ops import FILLER, POOLS, check, features_of, numbers_of, taped
from tests.ops.test_reference_ops import CASES, Case, conv, delta, dual, linear_scan, run, selective, spread, tensors_of

SCANS = (ops.CausalConv, ops.SelectiveScan, ops.DualScan, ops.GatedDeltaScan, ops.LinearScan)
ISAS = pytest.mark.parametrize("isa", _native.available_isas())
PAGES = 9

TABLE = [case for op in SCANS for case in CASES[op] if case.starts is None and sum(case.lengths) <= FILLER]
LENGTHS = (1, 23, 6)
AWKWARD = [
    *(
        conv(f"{channels}-{taps}-{bias}-{activation}", channels, taps, bias, activation, lengths=LENGTHS)
        for channels, taps, bias, activation in (
            (1, 4, True, "silu"), (7, 1, False, None), (63, 2, True, None), (64, 3, False, "silu"), (65, 4, False, None),
            (130, 4, True, "gelu"), (200, 7, True, "silu"), (12, 30, False, None),
        )
    ),
    *(
        selective(f"{channels}-{states}", channels, states, lengths=LENGTHS)
        for channels, states in ((1, 16), (15, 3), (16, 16), (17, 1), (40, 5), (75, 12))
    ),
    *(
        dual(f"{heads}-{width}-{states}-{groups}", heads, width, states, groups, lengths=LENGTHS, **limits)
        for heads, width, states, groups, limits in (
            (1, 1, 128, 1, {}), (6, 7, 3, 2, {"dt_min": 0.4, "dt_max": 0.9}), (2, 31, 5, 1, {}), (4, 32, 16, 4, {}), (3, 33, 9, 3, {}),
            (2, 64, 24, 1, {"dt_min": 0.1}), (2, 75, 17, 2, {}),
        )
    ),
    dual("long", 5, 40, 3, 1, lengths=(131, 64, 65)),
    linear_scan("long", 5, 1, 4, 40, lengths=(131, 64, 65)),
    *(
        delta(f"{keys}-{values}-{key_dim}-{value_dim}", keys, values, key_dim, value_dim, lengths=LENGTHS)
        for keys, values, key_dim, value_dim in (
            (1, 1, 1, 1), (2, 6, 7, 3), (3, 3, 16, 32), (1, 4, 33, 31), (2, 4, 24, 65), (1, 2, 128, 64)
        )
    ),
    *(
        linear_scan(f"{heads}-{kv_heads}-{head_dim}-{value_dim}", heads, kv_heads, head_dim, value_dim, lengths=LENGTHS, fill=fill)
        for heads, kv_heads, head_dim, value_dim, fill in (
            (1, 1, 1, 1, None), (6, 2, 7, 3, None), (3, 3, 16, 32, None), (4, 1, 33, 31, None), (4, 2, 20, 65, None), (2, 1, 64, 64, None),
            (2, 1, 9, 40, {"q": spread(30.0), "k": spread(300.0)}),
        )
    ),
]  # fmt: skip
LARGE = [
    conv("large", 900, 4, True, "silu", lengths=(37, 1, 50)), selective("large", 75, 12, lengths=(37, 1, 50)),
    dual("large", 6, 40, 24, 2, lengths=(37, 1, 50)), delta("large", 2, 6, 24, 40, lengths=(37, 1, 50)),
    linear_scan("large", 6, 3, 20, 40, lengths=(37, 1, 50)),
]  # fmt: skip
"""Enough work for two threads."""


class Player:
    """The op of a case on a tape, and its pages. Token t of a batch is row t of the case's inputs."""

    def __init__(self, case, arrays, features, isa, threads=1):
        program, weights = taped(case, arrays, features, False)
        program = dataclasses.replace(program, states=(case.group,))
        rows = sum(case.lengths)
        compiled = compile_program(
            program, weights, all_packed(POOLS[threads - 1]), POOLS[threads - 1], isa=isa, most_tokens=rows, page=16, pages={"s": PAGES}
        )
        self.tape, (self.pool,), self.width = compiled.tape, compiled.pools, program.values["logits"].features[0]
        self.bounds = np.cumsum([0, *case.lengths])
        self.threads = np.zeros((self.tape.ops, self.tape.threads), np.int64)
        self.poison(range(PAGES))

    def poison(self, pages):
        for page in pages:
            self.pool.write_page(page, np.full(self.pool.page_bytes // 4, np.nan, np.float32).view(np.uint8))

    def step(self, parts):
        """What a step gives for the rows [begin, end) of sequences whose state is in a page: parts of (sequence, begin, end, page)."""
        positions = [np.arange(begin, end, dtype=np.int32) for _, begin, end, _ in parts]
        tokens = np.concatenate([self.bounds[s] + own for (s, *_), own in zip(parts, positions)]).astype(np.int32)
        offsets = np.cumsum([0, *map(len, positions)]).astype(np.int32)
        logits = np.full((len(tokens), self.width), np.nan, np.float32)
        tables = [_native.PageTable([[page]]) for *_, page in parts]
        rows = np.arange(len(tokens), dtype=np.int32)
        self.tape.profile(tokens, np.concatenate(positions), offsets, rows, tables, logits, self.threads)
        assert not logits[:, -FILLER:].any()
        return np.split(logits[:, :-FILLER], offsets[1:-1])

    def whole(self):
        """All rows in one step, every sequence in a page of its own."""
        lengths = np.diff(self.bounds).tolist()
        return np.concatenate(self.step([(s, 0, length, PAGES - 1 - s) for s, length in enumerate(lengths)]))


def prepared(case: Case):
    arrays = numbers_of(case)
    made = {name: tensor.double().numpy() for name, tensor in run(case, tensors_of(arrays)).items() if not name.startswith("after:")}
    return arrays, made, features_of(case, made)


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@ISAS
@pytest.mark.parametrize("case", [*TABLE, *AWKWARD], ids=str)
def test_within_the_contract(case, isa):
    arrays, expected, features = prepared(case)
    check(case, {"y": Player(case, arrays, features, isa).whole()}, expected)


@ISAS
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_same_bits_however_cut(case, isa):
    """Two threads, sequences alone, chunks beside chunks of others, token by token: all as one thread in one step."""
    arrays, expected, features = prepared(case)
    one, two = (Player(case, arrays, features, isa, threads) for threads in (1, 2))
    whole = one.whole()
    check(case, {"y": whole}, expected)
    pieces = np.split(whole, one.bounds[1:-1])
    assert same_bits(two.whole(), whole)
    op = next(index for index, name in enumerate(two.tape.op_names) if name in {"causal_conv", "linear_scan"} or name.endswith("_scan"))
    assert (two.threads[op] > 1000).all(), "each thread had a part"
    for player in (one, two):
        for sequence, length in enumerate(case.lengths):
            assert same_bits(player.step([(sequence, 0, length, 3)])[0], pieces[sequence])
        assert same_bits(np.concatenate([player.step([(0, t, t + 1, 5)])[0] for t in range(20)]), pieces[0][:20])
        rng = np.random.default_rng(7)
        done, rows = [0] * len(case.lengths), [[] for _ in case.lengths]
        player.poison(range(PAGES))
        steps = 0
        while any(at < length for at, length in zip(done, case.lengths)):
            parts = []
            for sequence in rng.permutation(len(done)).tolist():
                begin, left = done[sequence], case.lengths[sequence] - done[sequence]
                if left and (rng.random() < 0.7 or not parts):
                    parts.append((sequence, begin, begin + int(rng.integers(1, min(left, 9) + 1)), sequence))
            for (sequence, _, end, _), got in zip(parts, player.step(parts), strict=True):
                rows[sequence].append(got)
                done[sequence] = end
            steps += 1
        assert steps > 5
        for sequence, got in enumerate(rows):
            assert same_bits(np.concatenate(got), pieces[sequence])


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_page_is_all_that_a_sequence_keeps(case):
    """Copied, taken out and brought back to another place, it goes on as it was; at position 0 what a page held is nobody's."""
    arrays, _, features = prepared(case)
    player = Player(case, arrays, features, "best")
    first, rest = np.split(player.step([(0, 0, 37, 0)])[0], [20])
    player.poison([0])
    assert same_bits(player.step([(0, 0, 20, 0)])[0], first)
    player.pool.copy_page(0, 4)
    kept = np.zeros(player.pool.page_bytes, np.uint8)
    player.pool.read_page(0, kept)
    assert np.isfinite(kept.view(np.float32)).all()
    assert player.pool.page_bytes == case.group.bytes_per_sequence()
    player.poison([0])
    player.pool.write_page(7, kept)
    for page in (4, 7):
        assert same_bits(player.step([(0, 20, 37, page)])[0], rest)
    assert same_bits(player.step([(0, 0, 20, 7)])[0], first)
    player.poison([8])
    assert np.isnan(player.step([(0, 20, 21, 8)])[0]).any(), "what a page holds is read"


def test_what_does_not_fit_is_refused():
    case = LARGE[0]
    arrays, _, features = prepared(case)
    player = Player(case, arrays, features, "generic")
    for page in (-1, PAGES):
        with pytest.raises(ValueError, match=f"page {page} is outside the cache"):
            player.step([(0, 0, 3, page)])
    tape = _native.Tape(POOLS[0], "generic", 64, 1, 4, 10)
    keys = tape.group(_native.PagePool("bf16", 1, 1, 16, 1, 4, 4))
    states = tape.group(_native.StatePool(2, 3, 2 * 4 * 8))
    weight = np.zeros((8, 3), np.float32)
    for group in (keys, states + 1, -1):
        with pytest.raises(ValueError, match=f"group {group} keeps no recurrent state"):
            tape.causal_conv(group, 0, 0, 0, 8, 3, weight, [], None)
    with pytest.raises(ValueError, match="slot 2 is no layer"):
        tape.dual_scan(states, 2, 0, 0, 0, 0, 0, 2, 1, 4, 8, [0.0] * 2, [0.0] * 2, [0.0] * 2, 0.0, 1.0)
    with pytest.raises(ValueError, match="a state of 16 numbers is not the group's, which has 64"):
        tape.causal_conv(states, 0, 0, 0, 8, 3, weight, [], None)
    with pytest.raises(ValueError, match="d has 1 numbers, not 2"):
        tape.dual_scan(states, 0, 0, 0, 0, 0, 0, 2, 1, 4, 8, [0.0] * 2, [0.0], [0.0] * 2, 0.0, 1.0)
    with pytest.raises(ValueError, match="a weight of 24 numbers is not 32 × 3"):
        tape.causal_conv(states, 0, 0, 0, 32, 3, weight, [], None)
    with pytest.raises(ValueError, match="at least one"):
        _native.StatePool(1, 0, 4)
    with pytest.raises(ValueError, match="a page has 512 bytes, not 4"):
        _native.StatePool(2, 1, 64).read_page(0, np.zeros(4, np.uint8))
