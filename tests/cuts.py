"""The determinism contract as a test asks for it: one sequence, however its batch is cut, gives the same bits."""

import itertools
from collections.abc import Sequence

import numpy as np

from hasten.backends.cpu import CpuSession
from hasten.engine.stepper import Stepper
from hasten.program import Batch


def assert_the_same_bits_however_cut(sessions: Sequence[CpuSession], ids: list[int], seeds: int = 2) -> None:
    """``sessions`` play one model: the first plays ``ids`` whole, all play them in chunks, beside others, token by token."""
    whole = sessions[0].score(Batch.of([ids]))
    assert np.isfinite(whole).all()
    for session, seed in itertools.product(sessions, range(seeds)):
        cuts = sorted(np.random.default_rng(seed).choice(np.arange(1, len(ids)), 5, replace=False).tolist())
        stepper = Stepper(session)
        state, rows = stepper.start(3), []
        others = [ids[7:19], ids[50:51]]
        for begin, end in zip([0, *cuts], [*cuts, len(ids)]):
            if begin == 0:  # the first piece beside two other prompts, the rest alone
                logits, state = stepper.step(Batch.of([others[0], ids[:end], others[1]], [0, 0, 0]), state)
                rows.append(logits[12 : 12 + end])
                state = state.select([1])
            else:
                logits, state = stepper.step(Batch.of([ids[begin:end]], [begin]), state)
                rows.append(logits)
        assert np.array_equal(np.concatenate(rows), whole)
        state, rows = stepper.start(1), []
        for position in range(20):
            logits, state = stepper.step(Batch.of([[ids[position]]], [position]), state)
            rows.append(logits)
        assert np.array_equal(np.concatenate(rows), whole[:20])
