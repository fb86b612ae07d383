"""Pages of a step, moved together, against one after the other in plain torch."""

import numpy as np
import pytest
import torch

from hasten.backends.cuda import moving
from hasten.backends.cuda.kernels.cache import GroupCache
from hasten.backends.cuda.kernels.states import StatePool
from hasten.backends.cuda.moving import Moving
from hasten.program import CopyPage, SwapIn, SwapOut

PAGES, PLACES = 6, 4


def filled(pool):
    for seed, x in enumerate(pool.tensors):
        numbers = torch.from_numpy(np.random.default_rng(seed).integers(-100, 100, x.shape).astype(np.float32))
        x.copy_(numbers.to(x.dtype))
    return pool


def random_moves(rng, count, groups):
    """Any that make sense: places are freed by those who come back, and taken again."""
    taken, made = [set() for _ in range(groups)], []
    for _ in range(count):
        group = int(rng.integers(groups))
        source, target = rng.choice(PAGES, 2, replace=False).tolist()
        free = sorted(set(range(PLACES)) - taken[group])
        kind = rng.integers(3)
        if kind == 0 and free:
            made.append(SwapOut(group, source, free[0]))
            taken[group].add(free[0])
        elif kind == 1 and taken[group]:
            place = int(rng.choice(sorted(taken[group])))
            made.append(SwapIn(group, place, target))
            taken[group].remove(place)
        else:
            made.append(CopyPage(group, source, target))
    return made


@pytest.mark.parametrize("slots", [1, 2, 100])
def test_moves_are_carried_out_in_order_however_they_are_cut(slots, monkeypatch, device):
    pools = [filled(pool) for pool in (GroupCache.of(2, PAGES, 2, 4, 6, "int8", device), StatePool.of(3, PAGES, (5, 3), device))]
    page = max(sum(x[:, 0].nbytes for x in pool.tensors) for pool in pools)
    monkeypatch.setattr(moving, "BUFFER_BYTES", slots * page)
    launched, move_pages = [], moving.move_pages

    def counted(pool, buffer, moves):
        launched.append(len(moves))
        move_pages(pool, buffer, moves)

    monkeypatch.setattr(moving, "move_pages", counted)
    moved, expected, outside = Moving(pools, device), [[x.clone() for x in pool.tensors] for pool in pools], {}
    rng = np.random.default_rng(slots)
    steps = [random_moves(rng, 20, 2)]
    steps += [[SwapIn(group, place, 0) for group, place in left(steps[0])], []]
    for moves in steps:
        launched.clear()
        moved.carry_out(moves)
        for move in moves:
            for index, x in enumerate(expected[move.group]):
                match move:
                    case CopyPage():
                        x[:, move.target] = x[:, move.source].clone()
                    case SwapOut():
                        outside[move.group, move.place, index] = x[:, move.source].clone()
                    case SwapIn():
                        x[:, move.target] = outside.pop((move.group, move.place, index))
        assert all(torch.equal(x, y) for pool, its in zip(pools, expected) for x, y in zip(pool.tensors, its, strict=True))
        assert sum(launched) == len(moves)
        if slots == 100:
            assert len(launched) == len({move.group for move in moves})
    assert not outside
    assert {type(move) for move in steps[0]} == {CopyPage, SwapIn, SwapOut}


def left(moves):
    """Places that are taken behind ``moves``."""
    taken = {}
    for move in moves:
        match move:
            case SwapOut():
                taken[move.group, move.place] = None
            case SwapIn():
                del taken[move.group, move.place]
    return list(taken)
