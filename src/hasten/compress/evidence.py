"""What is written into a compressed model about what it was measured to be."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

from hasten.compress.gates import Shrunk
from hasten.measure.compare import Comparison
from hasten.measure.speed import Speeds, SpeedTest
from hasten.model import Model, Provenance


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """``most`` is the share by which the loss may rise, None for any; measured over ``tokens`` of ``path`` (None: the held-out set)."""

    most: float | None = 0.05
    path: Path | None = None
    tokens: int | None = 32768


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """How fast the original and the result are under ``test``, timed in turn."""

    test: SpeedTest
    original: Speeds
    made: Speeds

    def not_faster(self) -> list[str]:
        """A line for each batch and phase in which the result is slower than the original, or no faster."""
        return self.made.lines("slower", "no faster")


def with_evidence(model: Model, shrunk: Shrunk | None, found: Comparison | None, gate: Gate, timed: Timed | None) -> Model:
    """``model`` with a last entry of provenance that says what it was measured to be."""
    evidence: dict[str, Any] = {"bytes": model.weights.nbytes}
    if shrunk is not None:
        evidence |= {"smaller": shrunk.what, "smaller_bytes_before": shrunk.before, "smaller_bytes": shrunk.after}
    if found is not None:
        evidence |= dataclasses.asdict(found) | {"increase": found.increase, "text": str(gate.path or "held-out standard library")}
    if timed is not None:
        evidence["speed"] = dataclasses.asdict(timed)
    settings = {"most": gate.most, "tokens": gate.tokens, "python": platform.python_version()}
    return dataclasses.replace(model, provenance=(*model.provenance, Provenance("measured", settings, evidence)))
