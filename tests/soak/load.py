"""The load and fault checks of robustness.md at full size, by name: each its own server, and a line for people."""

import dataclasses
from collections.abc import Callable

from tests.serve.server import Server, serving
from tests.soak import bombs, disconnects, drain, neighbours, overload, slowloris


@dataclasses.dataclass(frozen=True)
class Check:
    """``rounds`` of ``run``, each against a new server begun with ``arguments`` and with the seed given."""

    arguments: tuple[str, ...]
    run: Callable[[Server, int], dict]
    told: Callable[[dict], str]
    rounds: int = 1

    def round(self, seed: int) -> dict:
        """One of them. Raises Difference."""
        with serving(*self.arguments) as server:
            return self.run(server, seed)


CHECKS = {
    "slowloris": Check(slowloris.ARGUMENTS, lambda server, seed: slowloris.run(server, 1000, 8.0, 5, 1.25), slowloris.told),
    "bombs": Check(bombs.ARGUMENTS, lambda server, seed: bombs.run(server, 1.0, seed), bombs.told),
    "neighbours": Check(neighbours.ARGUMENTS, lambda server, seed: neighbours.run(server, 100, seed), neighbours.told),
    "disconnects": Check(disconnects.ARGUMENTS, lambda server, seed: disconnects.run(server, 1000, seed), disconnects.told),
    "overload": Check(overload.ARGUMENTS, lambda server, seed: overload.run(server, 40.0, 300.0, 2, seed), overload.told),
    "drain": Check(drain.ARGUMENTS, lambda server, seed: drain.run(server, 100), drain.told, rounds=10),
}
