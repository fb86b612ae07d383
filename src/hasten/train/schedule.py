"""How fast is learned when: a rise, a plateau, a fall to nothing."""

import dataclasses

from hasten.base.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """Shares of the whole: the learning rate rises over the first ``warmup`` and falls linearly to 0 over the last ``decay``
    (Hägele et al. 2024, arXiv:2405.18392)."""

    warmup: float = 0.05
    decay: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ConfigError(f"warmup {self.warmup} and decay {self.decay} are shares of the whole; together they may be 1 at most")

    def at(self, step: int, steps: int) -> float:
        """The share of the learning rate that step number ``step`` of ``steps`` takes, above 0."""
        rise = (step + 1) / max(1.0, self.warmup * steps)
        fall = (steps - step) / max(1.0, self.decay * steps)
        return min(1.0, rise, fall)
