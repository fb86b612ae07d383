"""This machine's limits beside a measurement: short slices, to be taken between timed runs."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

from hasten import _native
from hasten.base import hardware
from hasten.base.errors import UserError

Arithmetic = Literal["bf16", "int8", "f32"]
"""What a peak multiplies; it adds in f32 or int32."""
DeviceArithmetic = Literal["bf16", "int8", "fp8", "f32"]
"""The same of a device."""

LEVELS = ("generic", "avx2", "avx512", "amx")
LEAST_READ_BYTES = 1 << 20  # a thread

_LEVEL_OF = {
    "generic": "generic", "avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512", "avx512_vnni": "avx512",
    "amx_bf16": "amx", "amx_int8": "amx",
}  # fmt: skip
_INSTRUCTIONS = {
    "amx_bf16": "tdpbf16ps", "amx_int8": "tdpbssd", "avx512_bf16": "vdpbf16ps", "avx512_vnni": "vpdpbusd", "avx512f": "vfmadd (zmm)",
}  # fmt: skip


def instruction(arithmetic: Arithmetic, isa: str) -> str:
    """The instruction whose rate a peak of ``arithmetic`` at ``isa`` is."""
    if isa == "avx2":
        return "vpmaddubsw" if arithmetic == "int8" else "vfmadd (ymm)"
    return _INSTRUCTIONS.get(isa, "plain C++")


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The limits at one moment: 1e9 bytes and 1e12 operations a second, a multiply-add being two."""

    read_gb_per_s: float
    peak_tops: float

    def seconds(self, read_bytes: float, operations: float) -> float:
        """The least time in which so much can be read and computed: the larger of the two."""
        return max(read_bytes / self.read_gb_per_s / 1e9, operations / self.peak_tops / 1e12)


@runtime_checkable
class KnowsItsLimits(Protocol):
    """A session on a device of its own, which measures that device itself."""

    weight_bytes: int
    """What a step reads of weights if it reads all experts."""
    isa: str
    """What its kernels are compiled for."""

    def limits(self, arithmetic: DeviceArithmetic, read_bytes: int) -> tuple[float, float]:
        """1e9 bytes that pass a second while so many are copied, and 1e12 operations a second of products, both now."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What to measure beside a run on ``device``: copying ``read_bytes`` there, and multiplying ``arithmetic``."""

    device: KnowsItsLimits
    arithmetic: DeviceArithmetic
    read_bytes: int

    @property
    def peak_isa(self) -> str:
        """What the peak is taken with."""
        return self.device.isa

    def slice(self) -> Slice:
        """Measure both now."""
        return Slice(*self.device.limits(self.arithmetic, self.read_bytes))


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What to measure beside a run: reading a buffer of ``read_bytes`` and multiplying ``arithmetic`` on ``threads`` threads, with the
    best instructions of ``level`` ('best': of the machine)."""

    threads: int
    level: str
    arithmetic: Arithmetic
    read_bytes: int

    @property
    def peak_isa(self) -> str:
        """The instruction set the peak is taken with."""
        return self._best(self.arithmetic)

    @property
    def buffer_bytes(self) -> int:
        """The buffer that is read: ``read_bytes``, at least 1 MiB a thread, at most half of the memory available."""
        available = hardware.memory().available
        most = self.read_bytes if available is None else min(self.read_bytes, available // 2)
        return max(most, LEAST_READ_BYTES * self.threads)

    def slice(self, seconds: float = 0.05) -> Slice:
        """Measure both now: the median of three reads, or of more where the buffer is small, and ``seconds`` of products.

        Raises UserError for a value out of range."""
        peaks = {"bf16": _native.bf16_peak, "int8": _native.int8_peak, "f32": _native.f32_peak}
        try:
            peak, _ = peaks[self.arithmetic](self.threads, seconds, self.peak_isa)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Slice(self.read_gb_per_s(), peak)

    def read_gb_per_s(self) -> float:
        """Measure reading now: the median of three, or of more where the buffer is small. Raises UserError for a value out of range."""
        size = self.buffer_bytes
        try:
            return _native.streaming_read(size, self.threads, max(3, min(50, (64 << 20) // size)), self._best("read"))[0]
        except ValueError as error:
            raise UserError(str(error)) from error

    def _best(self, kind: str) -> str:
        most = LEVELS.index(_native.isa_level(self.level))
        return next(isa for isa in _native.instruction_sets()[kind] if LEVELS.index(_LEVEL_OF[isa]) <= most)
