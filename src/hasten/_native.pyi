"""hasten's native code: what the processor has, and how fast it is."""

def cpu_vendor() -> str:
    """The processor's maker as it names itself, 'GenuineIntel'; empty away from x86-64."""

def cpu_brand() -> str:
    """The processor's model as it names itself; empty where it does not."""

def cpu_features() -> dict[str, bool]:
    """For each instruction set: does the processor have it, and does the system save its registers. All False away from x86-64."""

def amx_granted() -> bool:
    """Ask the kernel to let this process use AMX tiles; True if it does, and the grant stays. False where there are none."""

def instruction_sets() -> dict[str, list[str]]:
    """The instruction sets that 'read', 'bf16', 'int8' and 'f32' can be measured with on this machine, best first, 'generic' last."""

def streaming_read(bytes: int, threads: int, repeats: int, isa: str = "best") -> tuple[float, str]:
    """Read a freshly written buffer of ``bytes`` in huge pages, each pinned thread its own part, ``repeats`` times.

    Returns (rate, isa): the median rate over all threads, in GB/s (1e9 bytes a second), and the instruction set used.
    ``bytes`` is rounded down to 4 KiB per thread, and must be well above the last-level cache to show memory and not the cache.
    Raises ValueError for a value out of range or an isa this machine does not run, MemoryError if the buffer is refused.
    """

def bf16_peak(threads: int, seconds: float, isa: str = "best") -> tuple[float, str]:
    """Multiply bf16 numbers from the first-level cache, and add the products in f32, for ``seconds`` on each pinned thread.

    Returns (rate, isa): the rate over all threads, in TFLOP/s (a multiply-add is two), and the instruction set used; one without
    bf16 in its name multiplies in f32.
    Raises ValueError for a value out of range or an isa this machine does not run.
    """

def int8_peak(threads: int, seconds: float, isa: str = "best") -> tuple[float, str]:
    """Multiply int8 numbers from the first-level cache, and add the products in int32, for ``seconds`` on each pinned thread.

    Returns (rate, isa): the rate over all threads, in TOP/s (a multiply-add is two), and the instruction set used.
    Raises ValueError for a value out of range or an isa this machine does not run.
    """

def f32_peak(threads: int, seconds: float, isa: str = "best") -> tuple[float, str]:
    """Multiply and add f32 numbers from the first-level cache, for ``seconds`` on each pinned thread.

    Returns (rate, isa): the rate over all threads, in TFLOP/s (a multiply-add is two), and the instruction set used.
    Raises ValueError for a value out of range or an isa this machine does not run.
    """
