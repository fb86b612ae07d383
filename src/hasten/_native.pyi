"""hasten's native code: what the processor has, and how fast it is."""

from collections.abc import Sequence

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

def activate(isa: str, activation: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """y = activation(x), of vectors."""

def gate_rows(isa: str, activation: str, gate: NDArray[np.float32], up: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    """y[r] = activation(gate[r]) · up[r]. gate [R], up [R, N]."""

def clamped_swiglu(
    isa: str, gate: NDArray[np.float32], up: NDArray[np.float32], alpha: float, limit: float, y: NDArray[np.float32]
) -> None:
    """y = g · sigmoid(alpha·g) · (u + 1), g = min(gate, limit), u = clip(up, ±limit), of vectors."""

def scale(isa: str, x: NDArray[np.float32], factor: float, y: NDArray[np.float32]) -> None:
    """y = x · factor, of vectors."""

def clip(isa: str, x: NDArray[np.float32], limit: float, y: NDArray[np.float32]) -> None:
    """y = min(max(x, −limit), limit), of vectors."""

def soft_cap(isa: str, x: NDArray[np.float32], cap: float, y: NDArray[np.float32]) -> None:
    """y = cap · tanh(x / cap), of vectors."""

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
    cache: NDArray[np.uint8],
    format: str,
    page: int,
    kv_heads: int,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    slots: NDArray[np.int64],
) -> None:
    """Round the rows of k and v to ``format`` (bf16, int8 or fp8) and write them to their slots (page number · page + place).

    A row of cache is a page: for each key/value head keys [page, key_dim], values [page, value_dim], and but for bf16 the float32 scales
    of the keys [page] and of the values [page]."""

def attend(
    isa: str,
    cache: NDArray[np.uint8],
    format: str,
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

class WeightBuffer:
    """A linear layer's weight [out, in_] in panels of 16 output channels, as the kernels read it: reserved, then packed.

    ``format`` is f32, f16, bf16, fp8, int8, int4, int3, int2 or lut4; ``group`` inputs share a scale (32, 64 or a multiple of 128 up to
    1024), 0 for one per channel or none. Integers of up to four bits may have zero points; bf16, int8 and int4 may be sparse.
    Raises ValueError for what cannot be packed, MemoryError if there is no room.
    """

    def __init__(self, format: str, out: int, in_: int, group: int = 0, zero_points: bool = False, sparse: bool = False) -> None: ...
    def pack(self, pool: ThreadPool, dense: NDArray[np.uint16] | NDArray[np.float32]) -> None:
        """Fill it from ``dense`` [out, in_], float32 or the bits of bf16 numbers. Raises ValueError for an array that does not fit."""

    def pack_codes(
        self,
        pool: ThreadPool,
        codes: NDArray[np.int8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.int8] | None = None,
        codebook: NDArray[np.int8] | None = None,
    ) -> None:
        """Fill it from what is quantized already, as it is: ``codes`` [out, in_] (of fp8 their bytes), ``scales`` and, with zero points,
        ``zeros`` [out, groups]; of lut4 places in ``codebook`` [16]; a sparse weight leaves out codes of 0. Raises ValueError for arrays
        that do not fit."""

    def parts(self) -> list[NDArray[np.uint8]]:
        """All the memory that packing fills, as views, in an order that stays; not of a sparse weight, which has its own once packed."""

    def lie_in(self, file: MappedFile, offsets: list[int]) -> None:
        """Take the numbers from a file instead, where ``parts`` begin at these offsets. Raises ValueError for parts it does not hold."""

    def unpack(self) -> NDArray[np.float32]:
        """The value of each element as the product sees it: float32 [out, in_]."""

    @property
    def format(self) -> str: ...
    @property
    def group(self) -> int: ...
    @property
    def out(self) -> int: ...
    @property
    def in_(self) -> int: ...
    @property
    def padded_in(self) -> int: ...
    @property
    def panels(self) -> int: ...
    @property
    def two_of_four(self) -> bool:
        """Whether it is sparse with two elements in every four inputs, which kernels need not look for."""

    @property
    def nbytes(self) -> int: ...

def linear(
    isa: str,
    weight: WeightBuffer,
    x: NDArray[np.float32] | NDArray[np.int8],
    bias: NDArray[np.float32] | None,
    first_panel: int,
    last_panel: int,
    out: NDArray[np.float32],
    scales: NDArray[np.float32] | None = None,
    activations: str | None = None,
) -> None:
    """out[:, c] = x · weightᵀ + bias for the channels c of the panels [first_panel, last_panel); other channels stay.

    x [rows, in] is rounded to bf16 or to int8 as the weight's format asks (integers take bf16 if ``activations`` says so; f32 and f16
    take float32); or it is int8 with ``scales`` [rows].
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

def quantize_fixed(isa: str, x: NDArray[np.float32], padded: int, step: float) -> NDArray[np.int8]:
    """x [rows, n] as int8 [rows, padded]: x / step rounded half to even, brought within ±127.

    Raises ValueError for an isa this machine does not run, or a shape that does not fit.
    """

def isa_level(isa: str = "best") -> str:
    """The instruction-set level that kernels run at: generic, avx2, avx512 or amx. Raises ValueError for one this machine lacks."""

class ThreadPool:
    """Threads that play steps together, the caller's included; asleep between steps."""

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class ExpertWeights:
    """The weights of a layer's experts, packed alike."""

    def __init__(self, experts: list[WeightBuffer]) -> None: ...
    @property
    def nbytes(self) -> int: ...

def digest(data: NDArray[np.uint8]) -> int:
    """The sum, modulo 2**64, of the XXH64 of every 256 KiB of ``data``, each seeded with its number."""

def will_need(data: NDArray[np.uint8]) -> None:
    """Let the system fetch a mapped array from disk ahead of who reads it."""

def read_stored(pool: ThreadPool, file: int, offset: int, data: NDArray[np.uint8]) -> int:
    """Fill ``data`` from a file descriptor, every thread a run of its own, and return its digest. Raises OSError."""

class MappedFile:
    """The first ``size`` bytes of a file descriptor, read where the system keeps them. Raises OSError.

    An extent is (offset, size); ValueError is raised for one beyond the end."""

    def __init__(self, file: int, size: int) -> None: ...
    @property
    def resident(self) -> bool:
        """Whether all of it is in memory."""

    def digests(self, pool: ThreadPool, extents: list[tuple[int, int]]) -> list[int]:
        """The digest of each extent, by all threads together."""

    def move(self, extents: list[tuple[int, int]], digests: list[int]) -> None:
        """Begin to move it to huge pages of its own, in the background, and compare these digests with those of what was moved."""

    def moved(self) -> int:
        """Wait for the end of the move, which rests no more; how many bytes lie in memory of their own."""

    @property
    def changed(self) -> bool:
        """Whether a digest was another when it was moved: somebody changed the file."""

class TableBuffer:
    """Rows of bf16 bits [rows, width] that are looked up: reserved, then filled."""

    def __init__(self, rows: int, width: int) -> None: ...
    @property
    def part(self) -> NDArray[np.uint8]:
        """Its memory, as a view."""

    def lie_in(self, file: MappedFile, offset: int) -> None:
        """Take the rows from a file instead. Raises ValueError where it does not hold them."""

class Pages:
    """What sequences keep of one state group, page by page, each a run of bytes."""

    @property
    def pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def copy_page(self, from_: int, to: int) -> None:
        """Copy what every layer has in one page over another's. Raises ValueError for a page out of range."""

    def read_page(self, page: int, into: NDArray[np.uint8]) -> None:
        """Copy all of a page to ``into`` [page_bytes]. Raises ValueError for a page out of range or another size."""

    def write_page(self, page: int, from_: NDArray[np.uint8]) -> None:
        """Copy what read_page gave over a page. Raises ValueError for a page out of range or another size."""

class PagePool(Pages):
    """Keys and values of a state group in pages of ``page`` tokens; ``format`` is bf16, int8 or fp8. With ``value_dim`` 0 keys alone, in
    bf16, which begin with the values. Raises ValueError for another format."""

    def __init__(self, format: str, layers: int, pages: int, page: int, kv_heads: int, key_dim: int, value_dim: int) -> None: ...
    @property
    def page(self) -> int: ...

class StatePool(Pages):
    """Recurrent states: a page is all that one sequence keeps, ``size`` float32 numbers a layer."""

    def __init__(self, layers: int, pages: int, size: int) -> None: ...

class PageTable:
    """The pages that hold one sequence, per state group in the order of its positions; of recurrent state the one."""

    def __init__(self, pages: Sequence[Sequence[int]]) -> None: ...
    def pages(self, group: int) -> list[int]: ...

class Tape:
    """A compiled Program. Places are byte offsets into its arena, -1 is the caller's logits, and -2 - n is byte n of a thread's own
    block, inside a chain. Ops play in the order they were added; those between an open and ``close`` are played as one."""

    def __init__(self, pool: ThreadPool, isa: str, arena_bytes: int, most_tokens: int, vocab: int, context: int) -> None: ...
    @property
    def ops(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def op_names(self) -> list[str]: ...
    def group(self, pages: PagePool | StatePool) -> int: ...
    def embed(self, table: NDArray[np.uint16] | TableBuffer, scale: float, y: int) -> None: ...
    def rotary_table(self, frequencies: list[float], magnitude: float, cos: int, sin: int) -> None: ...
    def rms_norm(self, logit_rows: bool, x: int, y: int, n: int, group: int, weight: list[float], eps: float, offset: float) -> None: ...
    def feed(
        self, logit_rows: bool, x: int, y: int, scales: int | None, runs: int, n: int, padded: int, stride: int
    ) -> None: ...  # fmt: skip
    def feed_fixed(
        self, logit_rows: bool, x: int, y: int, scales: int, runs: int, n: int, padded: int, stride: int, step: float
    ) -> None: ...  # fmt: skip
    def linear(
        self, logit_rows: bool, weight: WeightBuffer, x: int, scales: int | None, y: int, stride: int, bias: list[float]
    ) -> None: ...
    def rotate(self, x: int, y: int, cos: int, sin: int, heads: int, head_dim: int, start: int, dims: int, interleaved: bool) -> None: ...
    def append_kv(self, group: int, slot: int, k: int, v: int) -> None: ...
    def attend(
        self, group: int, slot: int, q: int, y: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, scale: float, window: int,
        softcap: float, slopes: list[float], sinks: list[float],
    ) -> None: ...  # fmt: skip
    def add(self, a: int, b: int, y: int, n: int) -> None: ...
    def gate(self, activation: str, gate: int, up: int, y: int, n: int) -> None: ...
    def route(
        self, logits: int, experts: int, weights: int, count: int, top_k: int, sigmoid: bool, normalize: bool, scale: float, groups: int,
        top_groups: int, correction: list[float],
    ) -> None: ...  # fmt: skip
    def group_by_expert(self, experts: int, starts: int, places: int, count: int, top_k: int) -> None: ...
    def gather_rows(
        self, x: int, scales: int, places: int, y: int, y_scales: int, top_k: int, row_bytes: int, scaled: bool
    ) -> None: ...  # fmt: skip
    def expert_linear(
        self, weights: ExpertWeights, scaled: bool, x: int, scales: int, starts: int, y: int, stride: int, bias: list[float]
    ) -> None: ...  # fmt: skip
    def combine(self, x: int, weights: int, places: int, y: int, top_k: int, n: int) -> None: ...
    def embed_positions(self, table: NDArray[np.float32], y: int) -> None:
        """Row ``position`` of ``table``. Raises ValueError for a table of fewer rows than the context."""
    def layer_norm(
        self, logit_rows: bool, x: int, y: int, n: int, group: int, weight: list[float], bias: list[float], eps: float
    ) -> None: ...  # fmt: skip
    def activate(self, logit_rows: bool, activation: str, x: int, y: int, n: int) -> None: ...
    def scale(self, logit_rows: bool, x: int, y: int, n: int, factor: float) -> None: ...
    def clip(self, logit_rows: bool, x: int, y: int, n: int, limit: float) -> None: ...
    def soft_cap(self, logit_rows: bool, x: int, y: int, n: int, cap: float) -> None: ...
    def gate_rows(self, activation: str, gate: int, up: int, y: int, n: int) -> None: ...
    def clamped_swiglu(self, gate: int, up: int, y: int, n: int, alpha: float, limit: float) -> None: ...
    def copy_features(self, logit_rows: bool, heads: int, parts: list[tuple[int, int, int, int, int, int, int]]) -> None:
        """Each part is (x, y, size, x_head, x_at, y_head, y_at): of every head, ``size`` features from x_at of x to y_at of y."""
    def feed_heads(self, x: int, y: int, heads: int, n: int, padded: int, stride: int) -> None: ...
    def head_linear(self, weights: list[WeightBuffer], x: int, y: int, stride: int) -> None:
        """One bf16 weight a head, of rows as ``feed_heads`` makes them. Raises ValueError for weights of different shapes."""
    def causal_conv(
        self, group: int, slot: int, x: int, y: int, channels: int, taps: int, weight: NDArray[np.float32], bias: list[float],
        activation: str | None,
    ) -> None: ...  # fmt: skip
    def selective_scan(
        self, group: int, slot: int, x: int, dt: int, b: int, c: int, y: int, channels: int, states: int, a_log: NDArray[np.float32],
        d: list[float], dt_bias: list[float],
    ) -> None: ...  # fmt: skip
    def dual_scan(
        self, group: int, slot: int, x: int, dt: int, b: int, c: int, y: int, heads: int, groups: int, head_dim: int, states: int,
        a_log: list[float], d: list[float], dt_bias: list[float], dt_min: float, dt_max: float,
    ) -> None: ...  # fmt: skip
    def gated_delta_scan(
        self, group: int, slot: int, q: int, k: int, v: int, a: int, b: int, y: int, key_heads: int, value_heads: int, key_dim: int,
        value_dim: int, a_log: list[float], dt_bias: list[float],
    ) -> None: ...  # fmt: skip
    def linear_scan(
        self, group: int, slot: int, q: int, k: int, v: int, y: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, floor: float
    ) -> None: ...
    def select_rows(self, x: int, y: int, n: int) -> None: ...
    def open_chain(self, most_rows: int, block_bytes: int) -> None: ...
    def open_products(self) -> None: ...
    def close(self) -> None: ...
    def run(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int32], offsets: NDArray[np.int32], rows: NDArray[np.int32],
        tables: list[PageTable], logits: NDArray[np.float32],
    ) -> int:  # fmt: skip
        """Play a batch and fill ``logits`` [R, vocab]; returns how often the threads met. ``rows`` must rise. Raises ValueError for ids,
        positions, rows or pages out of range, and plays nothing then."""

    def profile(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int32], offsets: NDArray[np.int32], rows: NDArray[np.int32],
        tables: list[PageTable], logits: NDArray[np.float32], op_ns: NDArray[np.int64],
    ) -> tuple[int, int]:  # fmt: skip
        """The same with a clock, which adds each op's nanoseconds on each thread to ``op_ns`` [ops, threads]: (nanoseconds of the whole
        without the clock's, the clock's)."""

# Mixture-of-experts kernels over arrays, for tests. Each raises ValueError for shapes that do not fit and an isa this machine does not run.

def route(
    logits: NDArray[np.float32], correction: NDArray[np.float32] | None, sigmoid: bool, normalize: bool, scale: float, groups: int,
    top_groups: int, experts: NDArray[np.int32], weights: NDArray[np.float32],
) -> None:  # fmt: skip
    """Choose experts [rows, top_k] and their weights from logits [rows, experts], as program.ops.Route has it."""

def group_by_expert(experts: NDArray[np.int32], count: int) -> tuple[list[int], list[int]]:
    """(starts, places) of choices [tokens, top_k] out of ``count`` experts."""

def expert_linear(
    isa: str, threads: int, weights: ExpertWeights, x: NDArray[np.float32], experts: NDArray[np.int32], bias: NDArray[np.float32] | None,
    y: NDArray[np.float32],
) -> None:  # fmt: skip
    """y[t · top_k + a] = x · weightᵀ + bias of expert experts[t, a], cut as for ``threads`` threads, on this one.

    x [tokens, in] or [tokens · top_k, in] is rounded as the weights' format asks."""

def combine(x: NDArray[np.float32], weights: NDArray[np.float32], experts: NDArray[np.int32], count: int, y: NDArray[np.float32]) -> None:
    """y[t] = the sum of weights[t, a] · x[t, a] in the order of choice; rows lie as choices ``experts`` out of ``count`` lay them."""

class SamplingRow:
    """How one request's tokens are drawn, and which ids it has seen how often. Settings are those of `hasten.SamplingParams`.

    ``seed`` and ``choice`` key the noise; ``logprobs`` is how many of the likeliest ids to report, -1 for none and not the drawn one's
    either; ``logit_bias`` is finite numbers to add to ids' logits. Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        choice: int = 0,
        logprobs: int = -1,
        prompt: NDArray[np.int64] | None = None,
        logit_bias: list[tuple[int, float]] = ...,
    ) -> None: ...
    def append(self, token: int) -> None:
        """Note a token of the output. Not while a step that draws for this row is running."""

class Sampler:
    """Draws for many rows at once, which share the threads of ``pool`` (None: the caller's alone). The same draws at every ``isa``."""

    def __init__(self, pool: ThreadPool | None, isa: str = "best") -> None: ...
    def sample(
        self,
        logits: NDArray[np.float32],
        rows: list[SamplingRow],
        positions: NDArray[np.int64],
        tokens: NDArray[np.int32],
        *,
        masks: NDArray[np.uint32] | None = None,
        logprobs: NDArray[np.float32] | None = None,
        top_ids: NDArray[np.int32] | None = None,
        top_logprobs: NDArray[np.float32] | None = None,
        purpose: int = 0,
    ) -> None:
        """Draw a token for every row of logits [R, vocab], without the interpreter lock; sampling.hpp says what a draw means.

        positions [R] are the drawn tokens' places in their sequences; bit i % 32 of word i / 32 of masks [R, ⌈vocab / 32⌉] allows id i.
        Fills tokens [R]; logprobs [R] of the drawn tokens, of the logits as they came, NaN for rows that ask for none; and top_ids,
        top_logprobs [R, N] with the likeliest ids, -1 and -inf beyond what a row asks for.
        Raises ValueError for shapes that do not fit, and, naming the first such row, where logits hold NaN or +inf or leave no id: its
        token is -1, and the other rows are drawn.
        """

    def candidates(
        self, logits: NDArray[np.float32], row: SamplingRow, mask: NDArray[np.uint32] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The ids that a draw from logits [1, vocab] may give, ascending, and their log-weights relative to the likeliest. mask [1, …].

        A softmax of the log-weights is the distribution drawn from. Raises as `sample` does.
        """

def noise(seed: int, choice: int, position: int, purpose: int, n: int) -> NDArray[np.float64]:
    """Uniform noise of ids 0 … n − 1, between 0 and 1 but neither: (⌊word / 2¹²⌋ + ½) · 2⁻⁵² of a word of 64 bits.

    Its upper half is word id % 4 of Philox4x32-10 (Salmon et al., SC 2011) with key (seed mod 2³², seed / 2³²) and counter (id / 4,
    position, choice, purpose), its lower half the same of (id / 4 + 2³¹, …).
    Raises ValueError for a number out of range, or an n above 2²¹.
    """
