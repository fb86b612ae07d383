"""A device's limits, measured beside a run: how fast it copies, and how fast its library multiplies."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hasten.backends.cuda.graphs import DeviceRecorder

LEAST_BYTES = 64 << 20  # of a copy: less than that stays in the cache
SIZE = 8192  # of the square matrices that are multiplied
FP8_CAPABILITY = (8, 9)
"""From which on a device multiplies fp8."""
Arithmetic = Literal["bf16", "int8", "fp8", "f32"]
_ARITHMETIC: dict[Arithmetic, torch.dtype] = {
    "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "f32": torch.float32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRoofline:
    """The most a device does: 1e9 bytes a second that pass while ``copied_bytes`` are copied, each read and written, and 1e12 operations
    a second of square products in torch, a multiply-add being two; of fp8 None where the device has none."""

    device: str
    isa: str
    copied_bytes: int
    copy_gb_per_s: float
    bf16_tflops: float
    int8_tops: float
    fp8_tflops: float | None
    f32_tflops: float


def measure_roofline(device: torch.device, name: str, capability: tuple[int, int], copied_bytes: int, repeats: int) -> DeviceRoofline:
    """Copy at most a quarter of the free memory, and multiply, ``repeats`` times each; medians count."""
    size = _size(device, copied_bytes)
    rates = {kind: _multiplied(device, kind, repeats) / 1e12 for kind in _ARITHMETIC if kind != "fp8" or capability >= FP8_CAPABILITY}
    return DeviceRoofline(
        name, "sm_{}{}".format(*capability), size, _copied(device, size, repeats) / 1e9, rates["bf16"], rates["int8"], rates.get("fp8"),
        rates["f32"],
    )  # fmt: skip


def limits(device: torch.device, arithmetic: Arithmetic, read_bytes: int) -> tuple[float, float]:
    """1e9 bytes a second that pass while ``read_bytes`` are copied (each is read and written), and 1e12 operations a second of a square
    product, a multiply-add being two."""
    return _copied(device, read_bytes) / 1e9, _multiplied(device, arithmetic) / 1e12


def _size(device: torch.device, asked: int) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    return max(LEAST_BYTES, min(asked, free // 4))


def _copied(device: torch.device, asked: int, repeats: int = 10) -> float:
    size = _size(device, asked)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(device, lambda: target.copy_(source), repeats)


def _multiplied(device: torch.device, arithmetic: Arithmetic, repeats: int = 10) -> float:
    edge = SIZE if device.type == "cuda" else 256
    kind = _ARITHMETIC[arithmetic]
    random = torch.Generator(device).manual_seed(0)  # numbers that change from place to place take more power than ones
    a, b = ((32 * torch.randn((edge, edge), device=device, generator=random)).to(kind) for _ in range(2))
    return 2 * edge**3 / seconds(device, _product(a, b), repeats)


def _product(a: Tensor, b: Tensor) -> Callable[[], object]:
    """a · b as torch's fastest; of fp8 a · bᵀ."""
    if a.dtype == torch.int8:
        return lambda: torch._int_mm(a, b)
    if a.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return lambda: a @ b


def graph_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The time of ``work`` as one graph, so that what Python takes to launch it does not count."""
    if device.type != "cuda":
        return seconds(device, work, 1)
    work()  # whatever is compiled is compiled before
    return seconds(device, DeviceRecorder(device).record(work))


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    """The median time of ``work`` on the device, which has done it once before."""
    work()
    times = []
    for _ in range(repeats):
        if device.type != "cuda":
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
