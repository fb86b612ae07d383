"""When requests are sent. Pure: seeds and rates in, seconds out."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ramp:
    """A request rate that goes from ``start`` to ``end`` a second, request by request."""

    strategy: Literal["linear", "exponential"]
    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ConfigError(f"a ramp from {self.start} to {self.end} requests a second: give two rates above 0")

    def rates(self, count: int) -> NDArray[np.float64]:
        """The rate at each of ``count`` requests, float64 [count]."""
        along = np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(count)
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * along
        rates: NDArray[np.float64] = self.start * (self.end / self.start) ** along
        return rates


def arrival_times(
    count: int, rate: float, *, burstiness: float = 1.0, ramp: Ramp | None = None, seed: int = 0
) -> NDArray[np.float64]:  # fmt: skip
    """Seconds from the start at which each of ``count`` requests is sent, float64 [count], never falling.

    The gaps are gamma-distributed of shape ``burstiness``: 1 is a Poisson process, less comes in bursts, more evenly. An infinite ``rate``
    sends all at once. Without a ramp all times are then scaled so that the last is count / rate, and so the rate is what was asked for,
    as `vllm bench serve` does. Raises ConfigError for a rate or burstiness that is not above 0."""
    if not rate > 0 or not 0 < burstiness < math.inf:
        raise ConfigError(f"request rate {rate} with burstiness {burstiness}: give numbers above 0; a rate of inf sends all at once")
    if rate == math.inf and ramp is None:
        return np.zeros(count)
    rates = np.full(count, rate) if ramp is None else ramp.rates(count)
    times = np.cumsum(np.random.default_rng(seed).gamma(burstiness, 1.0 / (rates * burstiness)))
    if ramp is None and count and times[-1] > 0:
        times *= count / rate / times[-1]
    return times
