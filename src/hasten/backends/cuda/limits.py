"""A device's limits, measured beside a run: how fast it copies, and how fast its library multiplies."""

import time
from collections.abc import Callable
from typing import Literal

import torch

LEAST_BYTES = 64 << 20  # of a copy: less than that stays in the cache
SIZE = 8192  # of the square matrices that are multiplied


def limits(device: torch.device, arithmetic: Literal["bf16", "int8", "f32"], read_bytes: int) -> tuple[float, float]:
    """1e9 bytes a second that pass while ``read_bytes`` are copied (each is read and written), and 1e12 operations a second of a square
    product, a multiply-add being two."""
    return _copied(device, read_bytes) / 1e9, _multiplied(device, arithmetic) / 1e12


def _copied(device: torch.device, size: int) -> float:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    size = max(LEAST_BYTES, min(size, free // 4))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(device, lambda: target.copy_(source))


def _multiplied(device: torch.device, arithmetic: Literal["bf16", "int8", "f32"]) -> float:
    edge = SIZE if device.type == "cuda" else 256
    kind = {"bf16": torch.bfloat16, "int8": torch.int8, "f32": torch.float32}[arithmetic]
    random = torch.Generator(device).manual_seed(0)  # numbers that change from place to place take more power than ones
    a, b = ((32 * torch.randn((edge, edge), device=device, generator=random)).to(kind) for _ in range(2))
    product: Callable[[], object] = (lambda: torch._int_mm(a, b)) if arithmetic == "int8" else (lambda: a @ b)
    return 2 * edge**3 / seconds(device, product)


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
