"""Ten thousand simulated runs of scheduler and cache; `make test` has the first of them."""

import collections

from benchmarks.ledger import Ledger
from tests.pure.simulation import Violation, simulate
from tests.soak.determinism import Difference

SEEDS, PER_CHUNK = 10_000, 1000


def simulation(ledger: Ledger, digest: str, seeds: int, seed: int) -> None:
    """So many runs, chunk after chunk; raises Difference for one that breaks an invariant."""
    seen: collections.Counter[str] = collections.Counter()
    for begin in range(0, seeds, PER_CHUNK):
        end = min(seeds, begin + PER_CHUNK)
        key = ("simulation", digest, begin, end, seed)
        kept = ledger.get(*key)
        if kept is None:
            try:
                kept = dict(simulate(range(seed + begin, seed + end)))
            except Violation as error:
                raise Difference(str(error)) from error
            ledger.note(*key, value=kept)
        seen.update(kept)
    told = ", ".join(f"{what} {count:,}" for what, count in seen.most_common(8))
    print(f"simulation, {seeds:,} seeds, every invariant after every step: {told}")
