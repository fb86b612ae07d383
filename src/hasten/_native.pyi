"""hasten's native code: what the processor has, and how fast it is."""

import numpy as np
from numpy.typing import NDArray

def cpu_vendor() -> str:
    """The processor's maker as it names itself, 'GenuineIntel'; empty away from x86-64."""

def cpu_brand() -> str:
    """The processor's model as it names itself; empty where it does not."""

def cpu_features() -> dict[str, bool]:
    """For each instruction set: does the processor have it, and does the system save its registers. All False away from x86-64."""

def amx_granted() -> bool:
    """Ask the kernel to let this process use AMX tiles; True if it does, and the grant stays. False where there are none."""

def isa_refusals() -> dict[str, str]:
    """For each level of kernels, worst first (generic, avx2, avx512, amx): what this machine lacks for it; '' where it runs."""

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

# The decoder's kernels over arrays, for tests and measurements. ``isa`` is 'generic', 'avx2', 'avx512' or 'amx'; y is written in place
# and may be an input; bf16 goes as uint16. Each raises ValueError for shapes that do not fit and an isa this machine does not run.

def embed(table: NDArray[np.uint16], tokens: NDArray[np.int32], scale: float, y: NDArray[np.float32]) -> None:
    """y[t] = table[tokens[t]] · scale, of a bf16 table."""

def rms_norm(
    isa: str, x: NDArray[np.float32], weight: NDArray[np.float32], group: int, eps: float, offset: float, y: NDArray[np.float32]
) -> None:
    """y = x / sqrt(mean(x²) + eps) · (offset + weight) over runs of ``group`` features. weight [group] or [N]."""

def layer_norm(
    isa: str,
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    group: int,
    eps: float,
    y: NDArray[np.float32],
) -> None:
    """y = (x − mean) / sqrt(var + eps) · weight + bias over runs of ``group`` features. weight, bias [group] or [N]."""

def add(isa: str, a: NDArray[np.float32], b: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """y = a + b, of vectors."""

def gate(isa: str, activation: str, gate: NDArray[np.float32], up: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """y = activation(gate) · up, of vectors."""

def rotate(
    isa: str,
    x: NDArray[np.float32],
    heads: int,
    start: int,
    dims: int,
    interleaved: bool,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Rotary embedding of ``dims`` features of every head from ``start``; the others are copied. cos, sin [T, dims / 2]."""

def append_kv(
    cache: NDArray[np.uint16], page: int, kv_heads: int, k: NDArray[np.float32], v: NDArray[np.float32], slots: NDArray[np.int64]
) -> None:
    """Round the rows of k and v to bf16 and write them to their slots (page number · page + place). A row of cache is a page."""

def attend(
    isa: str,
    cache: NDArray[np.uint16],
    page: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    table: NDArray[np.int32],
    q: NDArray[np.float32],
    position: int,
    scale: float,
    y: NDArray[np.float32],
    window: int = 0,
    softcap: float = 0.0,
    slopes: NDArray[np.float32] | None = None,
    sinks: NDArray[np.float32] | None = None,
    chunk: int = 0,
) -> None:
    """Attention of one sequence's rows, which are at ``position`` and on, over its cached pages; ``chunk`` rows a call, 0 for all."""

def available_isas() -> list[str]:
    """The instruction-set levels of the kernels that this machine runs, best first: amx, avx512, avx2, generic."""

class PackedWeight:
    """A weight in panels of 16 output channels, as the linear kernels read it.

    ``format`` is bf16, int8 or int4; ``dense`` [out, in] has the bits of bf16 numbers; ``group`` is the number of inputs that share a
    scale in int4 (32, 64 or a multiple of 128 up to 1024), 0 for one scale per channel.
    Raises ValueError for a format, group or array that cannot be packed, MemoryError if there is no room.
    """

    def __init__(self, format: str, group: int, dense: NDArray[np.uint16]) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def group(self) -> int: ...
    @property
    def out(self) -> int: ...
    @property
    def in_(self) -> int: ...
    @property
    def panels(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def unpack(self) -> NDArray[np.float32]:
        """The value of each element as the product sees it: [out, in]."""

def linear(
    isa: str,
    weight: PackedWeight,
    x: NDArray[np.float32] | NDArray[np.int8],
    bias: NDArray[np.float32] | None,
    first_panel: int,
    last_panel: int,
    out: NDArray[np.float32],
    scales: NDArray[np.float32] | None = None,
) -> None:
    """out[:, c] = x · weightᵀ + bias for the channels c of the panels [first_panel, last_panel); other channels stay.

    x [rows, in] is rounded to bf16 or to int8 as the weight's format asks; or it is int8 with ``scales`` [rows].
    bias [out], out [rows, out]; all C-contiguous. Runs on this thread without the interpreter lock.
    Raises ValueError for an isa this machine does not run, or an array or panel that does not fit.
    """

def to_bf16(isa: str, x: NDArray[np.float32], padded: int) -> NDArray[np.uint16]:
    """x [rows, n] as the bits of bf16 numbers, rounded to nearest even: [rows, padded], zeros from n on.

    Raises ValueError for an isa this machine does not run, or a shape that does not fit.
    """

def quantize_rows(isa: str, x: NDArray[np.float32], padded: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """x [rows, n] as (int8 [rows, padded], scales [rows]): x · (127 / max|x|) rounded half to even, scale max|x| / 127.

    Raises ValueError for an isa this machine does not run, or a shape that does not fit.
    """

def isa_level(isa: str = "best") -> str:
    """The instruction-set level that kernels run at: generic, avx2, avx512 or amx. Raises ValueError for one this machine lacks."""

class ThreadPool:
    """Threads that play steps together, the caller's included; asleep between steps."""

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class WeightBuffer:
    """A linear layer's weight, packed from bf16 bits [out, in] for this machine's kernels; ``group`` is k per int4 scale, 0 per channel."""

    def __init__(self, pool: ThreadPool, format: str, group: int, dense: NDArray[np.uint16]) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def padded_in(self) -> int: ...

class PagePool:
    """Keys and values of a state group, bf16, in pages of ``page`` tokens."""

    def __init__(self, layers: int, pages: int, page: int, kv_heads: int, key_dim: int, value_dim: int) -> None: ...
    @property
    def pages(self) -> int: ...
    @property
    def page(self) -> int: ...

class Tape:
    """A compiled Program. Places are byte offsets into its arena; -1 is the caller's logits. Ops play in the order they were added."""

    def __init__(self, pool: ThreadPool, isa: str, arena_bytes: int, most_tokens: int, vocab: int, context: int) -> None: ...
    @property
    def ops(self) -> int: ...
    @property
    def op_names(self) -> list[str]: ...
    def group(self, pages: PagePool) -> int: ...
    def embed(self, table: NDArray[np.uint16], scale: float, y: int) -> None: ...
    def rotary_table(self, frequencies: list[float], magnitude: float, cos: int, sin: int) -> None: ...
    def rms_norm(self, logit_rows: bool, x: int, y: int, n: int, group: int, weight: list[float], eps: float, offset: float) -> None: ...
    def feed(self, logit_rows: bool, x: int, y: int, scales: int, n: int, padded: int, stride: int, to_int8: bool) -> None: ...
    def linear(self, logit_rows: bool, weight: WeightBuffer, x: int, scales: int, y: int, stride: int, bias: list[float]) -> None: ...
    def rotate(self, x: int, y: int, cos: int, sin: int, heads: int, head_dim: int, start: int, dims: int, interleaved: bool) -> None: ...
    def append_kv(self, group: int, slot: int, k: int, v: int) -> None: ...
    def attend(
        self, group: int, slot: int, q: int, y: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, scale: float, window: int,
        softcap: float, slopes: list[float], sinks: list[float],
    ) -> None: ...  # fmt: skip
    def add(self, a: int, b: int, y: int, n: int) -> None: ...
    def gate(self, activation: str, gate: int, up: int, y: int, n: int) -> None: ...
    def select_rows(self, x: int, y: int, n: int) -> None: ...
    def run(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int32], offsets: NDArray[np.int32], rows: NDArray[np.int32],
        slots: list[NDArray[np.int64]], tables: list[NDArray[np.int32]], logits: NDArray[np.float32],
    ) -> None:  # fmt: skip
        """Play one step and fill ``logits`` [R, vocab]. Raises ValueError for ids, positions, rows or pages out of range."""
    def profile(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int32], offsets: NDArray[np.int32], rows: NDArray[np.int32],
        slots: list[NDArray[np.int64]], tables: list[NDArray[np.int32]], logits: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], int]:  # fmt: skip
        """The same with a clock: (nanoseconds [ops, threads] of each op on each thread, nanoseconds of the whole step)."""
