"""Rows turned and written to pages, and pages moved: against the reference backend and the plain formats of hasten.formats.cache."""

import ml_dtypes
import numpy as np
import pytest
import torch

from hasten.backends.cuda.kernels import cache as kernels
from hasten.backends.reference import State, play
from hasten.formats.cache import ROW_FORMATS
from hasten.program import Batch, Layer, Program, Value, ops

FORMS = ["bfloat16", "int8", "fp8", "float32"]
NP = {torch.int8: np.int8, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}
LENGTHS, STARTS = (5, 1, 19), (14, 33, 0)  # over the edge of a page, in the middle of one, from the beginning


def numpy_of(x):
    x = x.cpu().contiguous()
    if x.dtype in {torch.int8, torch.float32}:
        return x.numpy()
    return x.view(torch.uint8 if x.itemsize == 1 else torch.int16).numpy().view(NP[x.dtype])


def rows_of(device, padding=3, lengths=LENGTHS, starts=STARTS, seed=0):
    """positions, sequence and pages of a step, with ``padding`` rows of no sequence and shuffled pages; and how many pages there are."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths)])
    sequence = np.r_[owners, np.full(padding, -1)].astype(np.int32)
    positions = np.r_[positions, np.full(padding, 7)].astype(np.int32)
    most = max(-(-(start + length) // 16) for start, length in zip(starts, lengths)) + 1
    numbers = np.random.default_rng(seed).permutation(len(lengths) * most + 2)
    table = np.full((len(lengths), most), -1, np.int32)
    for i, (start, length) in enumerate(zip(starts, lengths)):
        held = -(-(start + length) // 16)
        table[i, :held] = numbers[i * most : i * most + held]
    return *(torch.from_numpy(x).to(device) for x in (positions, sequence, table)), len(numbers)


def poisoned(group):
    """NaN where a format has it, 113 where not."""
    for x in group.tensors:
        if x.dtype == torch.int8:
            x.fill_(113)
        elif x.itemsize == 1:
            x.view(torch.uint8).fill_(0x7F)
        else:
            x.fill_(float("nan"))
    return group


def place(positions, sequence, table):
    """Page and token in it of every row that has a sequence, and which rows these are."""
    rows = np.flatnonzero(sequence.cpu().numpy() >= 0)
    at = positions.cpu().numpy()[rows]
    return table.cpu().numpy()[sequence.cpu().numpy()[rows], at // 16], at % 16, rows


def normal(shape, device, dtype, seed=1):
    x = np.random.default_rng(seed).standard_normal(shape) * np.exp(np.random.default_rng(seed + 1).standard_normal((shape[0], 1)) * 3)
    return torch.from_numpy(x.astype(np.float32)).to(dtype).to(device)


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, torch.float32) for form in FORMS] + [("int8", torch.bfloat16), ("bfloat16", torch.bfloat16)]
)
def test_what_is_written_is_what_the_format_says(form, dtype, device):
    positions, sequence, table, pages = rows_of(device)
    k, v = normal((len(positions), 3 * 10), device, dtype), normal((len(positions), 3 * 6), device, dtype, seed=5)
    k[2, 4], k[3], v[4, 0] = float("nan"), 0.0, float("inf")
    k[6, :10] = torch.arange(10) * 3.25 + 0.125  # halves of a step
    k[6, 9] = 127.0
    v[7, :6] = torch.tensor([448.0, 17.0, 19.0, 2.0**-7, 1.5 * 2.0**-9, 2.5 * 2.0**-9])  # e4m3: ties, and what is below its least exponent
    group = poisoned(kernels.GroupCache.of(2, pages, 3, 10, 6, form, device))
    before = [numpy_of(x).copy() for x in group.tensors]
    kernels.append(k, v, group.layer(1), positions, sequence, table, rows=32)
    page, token, rows = place(positions, sequence, table)
    for x, kept, scales in ((k, group.keys, group.key_scales), (v, group.values, group.value_scales)):
        given = x.float().cpu().numpy()[rows].reshape(len(rows), 3, -1)
        elements, scale = ROW_FORMATS[form].encode(given)
        bits = np.uint8 if elements.itemsize == 1 else f"u{elements.itemsize}"
        written = numpy_of(kept)[1, page, :, token]
        assert np.array_equal(written.view(bits)[~np.isnan(given)], elements.view(bits)[~np.isnan(given)])
        if scales is not None:
            assert np.array_equal(numpy_of(scales)[1, page, :, token], scale[..., 0].astype(np.float32), equal_nan=True)
    for x, old in zip(group.tensors, before):  # nothing else was written: not the other layer, not for padding, not the rest of a page
        untouched = np.ones(x.shape, bool)
        untouched[1, page, :, token] = False
        assert numpy_of(x)[untouched].tobytes() == old[untouched].tobytes()


ROTATIONS = {
    "whole": (8, 8, 0, False, 1.0),
    "interleaved": (6, 6, 0, True, 1.3),
    "partial": (10, 4, 0, False, 1.0),
    "from start": (9, 4, 3, True, 0.7),
    "two": (5, 2, 1, False, 1.0),
}


def rotated(x, heads, dims, start, interleaved, magnitude, frequencies):
    """The reference backend's Rotate of x [T, H·d] in float32, rows at LENGTHS and STARTS."""
    op = ops.Rotate(
        x="x", y="y", heads=heads, dims=dims, frequencies=frequencies, start=start, interleaved=interleaved, magnitude=magnitude
    )
    program = Program(
        ops=(op,), values={name: Value("T", (x.shape[1],), "float32") for name in "xy"}, params={}, states=(),
        layers=(Layer("all", 0, 1),), inputs=("x",), outputs=("y",), context=1 << 20,
    )  # fmt: skip
    batch = Batch.of([[0] * length for length in LENGTHS], STARTS)
    return play(program, {}, batch, State(len(LENGTHS), lengths=STARTS), given={"x": x.float().cpu()})[0]["y"]


def turn_of(positions, dims, start, interleaved, magnitude, frequencies, device):
    tables = [torch.full((len(positions), dims // 2), float("nan"), device=device) for _ in range(2)]
    kernels.rotary_tables(positions, torch.tensor(frequencies, device=device), *tables, magnitude=magnitude)
    return kernels.Turn(*tables, start=start, interleaved=interleaved)


@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float32) for case in ROTATIONS), ("interleaved", torch.bfloat16)])
def test_heads_are_turned_as_the_op_says(case, dtype, device):
    dim, dims, start, interleaved, magnitude = ROTATIONS[case]
    positions, sequence, _, _ = rows_of(device)
    frequencies = tuple(10000.0 ** (-2 * i / dims) for i in range(dims // 2))
    wide = normal((len(positions), 3 * dim + 7), device, dtype)
    x = wide[:, 2 : 2 + 3 * dim]  # between other features, as a fused projection leaves it
    y = torch.full((len(positions), 3 * dim), float("nan"), dtype=dtype, device=device)
    turn = turn_of(positions, dims, start, interleaved, magnitude, frequencies, device)
    kernels.rotate(x, y, turn, sequence, heads=3, rows=16)
    want = rotated(x[:25], 3, dims, start, interleaved, magnitude, frequencies)
    tolerance = ops.Rotate.contract.tolerance[dtype == torch.bfloat16]
    assert (y[:25].float().cpu() - want).abs().max() <= tolerance * want.abs().max()
    assert (y[25:] == 0).all()
    assert not torch.equal(y[:25], x[:25])


def test_far_positions_turn_by_float32_angles(device):
    positions = torch.tensor([100_003, 131_071, 1], dtype=torch.int32, device=device)
    frequencies = torch.tensor([1.0, 0.31, 1e-4], device=device)
    tables = [torch.full((3, 3), float("nan"), device=device) for _ in range(2)]
    kernels.rotary_tables(positions, frequencies, *tables)
    angles = (positions.float()[:, None] * frequencies).double()
    assert (tables[0] - angles.cos()).abs().max() < 1e-6
    assert (tables[1] - angles.sin()).abs().max() < 1e-6


@pytest.mark.parametrize(("case", "form"), [("whole", "fp8"), ("from start", "bfloat16"), ("partial", "int8")])
def test_one_launch_gives_the_bits_of_two(case, form, device):
    dim, dims, start, interleaved, magnitude = ROTATIONS[case]
    positions, sequence, table, pages = rows_of(device)
    count = len(positions)
    frequencies = tuple(10000.0 ** (-2 * i / dims) for i in range(dims // 2))
    turn = turn_of(positions, dims, start, interleaved, magnitude, frequencies, device)
    qkv = normal((count, (4 + 2) * dim + 2 * 3), device, torch.bfloat16)
    q, k, v = qkv[:, : 4 * dim], qkv[:, 4 * dim : 6 * dim], qkv[:, 6 * dim :]
    apart, fused = (poisoned(kernels.GroupCache.of(1, pages, 2, dim, 3, form, device)) for _ in range(2))
    y, k_turned, y_fused = (torch.full((count, heads * dim), float("nan"), dtype=q.dtype, device=device) for heads in (4, 2, 4))
    kernels.rotate(q, y, turn, sequence, heads=4, rows=16)
    kernels.rotate(k, k_turned, turn, sequence, heads=2, rows=32)
    kernels.append(k_turned, v, apart.layer(0), positions, sequence, table, rows=32)
    kernels.rotate_append(q, k, v, y_fused, turn, fused.layer(0), positions, sequence, table, heads=4, rows=16)
    assert torch.equal(y, y_fused)
    for one, other in zip(apart.tensors, fused.tensors):
        assert numpy_of(one).tobytes() == numpy_of(other).tobytes()
    assert numpy_of(fused.keys).tobytes() != numpy_of(poisoned(kernels.GroupCache.of(1, pages, 2, dim, 3, form, device)).keys).tobytes()


def test_a_latent_row_has_no_value(device):
    positions, sequence, table, pages = rows_of(device)
    k = normal((len(positions), 21), device, torch.bfloat16)
    group = poisoned(kernels.GroupCache.of(1, pages, 1, 21, None, "bfloat16", device))
    kernels.append(k, None, group.layer(0), positions, sequence, table)
    page, token, rows = place(positions, sequence, table)
    assert torch.equal(group.keys[0, page, 0, token].cpu(), k[rows].cpu())
    assert len(group.tensors) == 1


@pytest.mark.parametrize("form", ["bfloat16", "int8", "fp8"])
def test_pages_move_one_after_the_other(form, device):
    """Copies, out and in again, each building on the one before; also more of a page than one program takes."""
    rng = np.random.default_rng(3)
    pool, outside = (kernels.GroupCache.of(2, count, 3, 20, 12, form, device) for count in (6, 4))
    for x in (*pool.tensors, *outside.tensors):
        x.view(torch.uint8).copy_(torch.from_numpy(rng.integers(0, 120, x.view(torch.uint8).shape, dtype=np.uint8)))
    moves = [(0, 3), (3, 5), (5, 6 + 2), (-1, -1), (1, 5), (6 + 2, 1), (4, 4), (6 + 0, 0), (6 + 3, 6 + 1), (-1, 2)]
    want = [np.concatenate([numpy_of(a), numpy_of(b)], axis=1) for a, b in zip(pool.tensors, outside.tensors)]
    for source, target in moves:
        for x in want:
            if source >= 0:
                x[:, target] = x[:, source]
    kernels.move_pages(pool, outside, torch.tensor(moves, dtype=torch.int32, device=device), words=64)
    for a, b, x in zip(pool.tensors, outside.tensors, want):
        assert numpy_of(a).tobytes() == x[:, :6].tobytes()
        assert numpy_of(b).tobytes() == x[:, 6:].tobytes()
