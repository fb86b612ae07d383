"""How a figure is read from what commands printed. rounds[round][command] is a list of JSON objects; medians are over rounds."""

import dataclasses
import itertools
import statistics


@dataclasses.dataclass(frozen=True)
class Field:
    """``key`` of the only object of the only command."""

    key: str

    def of(self, rounds):
        return statistics.median(_only(commands[0])[self.key] for commands in rounds)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """``key`` of the first command over that of the second, round by round."""

    key: str

    def of(self, rounds):
        return statistics.median(_only(commands[0])[self.key] / _only(commands[1])[self.key] for commands in rounds)


@dataclasses.dataclass(frozen=True)
class Inside:
    """``key`` of the object that the only object of the only command has under ``of_what``."""

    of_what: str
    key: str

    def of(self, rounds):
        return statistics.median(_only(commands[0])[self.of_what][self.key] for commands in rounds)


@dataclasses.dataclass(frozen=True)
class Recovered:
    """Which share of what the second command lost the first did not lose."""

    def of(self, rounds):
        return statistics.median(
            1 - (_only(first)["loss"] - _only(first)["base_loss"]) / (_only(second)["loss"] - _only(second)["base_loss"])
            for first, second in rounds
        )


@dataclasses.dataclass(frozen=True)
class LeastStep:
    """``key`` of each of ``weights`` over that of the one before it, at ``batch``; the least of them."""

    key: str
    batch: int
    weights: tuple[str, ...]

    def of(self, rounds):
        return statistics.median(min(later / earlier for earlier, later in itertools.pairwise(self._speeds(rows))) for (rows,) in rounds)

    def _speeds(self, rows):
        found = {row["weights"]: row[self.key] for row in rows if row["batch"] == self.batch}
        return [found[name] for name in self.weights]


@dataclasses.dataclass(frozen=True)
class OverBound:
    """``key`` of the first command over that of the second, as a share of the ``bound`` that the first printed, round by round."""

    key: str
    bound: str

    def of(self, rounds):
        return statistics.median(
            _only(first)[self.key] / _only(second)[self.key] / _only(first)[self.bound] for first, second in rounds
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LeastR2:
    """R² of a straight line through (x, y) of a command's objects."""

    x: str
    y: str

    def of(self, rounds):
        from hasten.measure.context import Line

        return statistics.median(
            Line.through([row[self.x] for row in rows], [row[self.y] for row in rows]).r2 for (rows,) in rounds
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """How far resident memory is from the planned, as a share, where it is farthest."""

    def of(self, rounds):
        return max(abs(row["resident_bytes"] / row["planned_bytes"] - 1) for (rows,) in rounds for row in rows)


@dataclasses.dataclass(frozen=True)
class Passes:
    """0 for commands that exited with 0; one that did not has no figure at all."""

    def of(self, rounds):
        return 0


@dataclasses.dataclass(frozen=True)
class BestPeer:
    """hasten's speed at ``what`` over that of the fastest peer of the same ``bits``."""

    bits: str
    what: str

    def of(self, rounds):
        ratios = [
            row["hasten_over_it"][self.what]
            for ((comparison,),) in rounds
            for row in comparison["rows"]
            if row["bits"] == self.bits and row["hasten_over_it"] is not None and row["hasten_over_it"][self.what] is not None
        ]
        if not ratios:
            raise LookupError(f"no peer ran in {self.bits}")
        return min(ratios)


@dataclasses.dataclass(frozen=True)
class PeersAtBatch:
    """hasten's speed in ``bits`` at ``what`` over that of the fastest peer in any format."""

    bits: str
    what: str

    def of(self, rounds):
        (((comparison,),),) = rounds
        mine = {row["bits"]: row["tokens_per_s"][self.what] for row in comparison["rows"] if row["runner"].startswith("hasten ")}
        theirs = [row["tokens_per_s"][self.what] for row in comparison["rows"] if not row["runner"].startswith("hasten ")]
        known = [speed for speed in theirs if speed is not None]
        if not known or mine.get(self.bits) is None:
            raise LookupError(f"no peer ran, or hasten did not in {self.bits}")
        return mine[self.bits] / max(known)


def _only(rows):
    if len(rows) != 1:
        raise LookupError(f"{len(rows)} objects were printed, not one")
    return rows[0]
