"""Compiles kernels for an H200 (sm_90) on any machine, and prints what came out: a line of JSON a kernel.

The interpreter plays a kernel as Python; what the compiler refuses, or compiles to another instruction, only the compiler tells. Plain
functions are called on tensors without memory, of the sizes of a large model, and every launch is compiled in place of run."""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.language import target_info
from triton.runtime.jit import JITFunction

from hasten.backends.cuda.drawing import FIELDS
from hasten.backends.cuda.kernels import attention, cache, dual_scan, experts, linear, linear_scan, rows, sampling, scans
from hasten.backends.cuda.kernels.linear import Scratch, Tiles, default_order, default_tiles, scratch_size
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.backends.cuda.kernels.states import Sequences, StatePool
from hasten.program import ops
from hasten.spec import Causal, ClampedSwiglu, SlidingWindow

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.float64: "fp64",
}  # fmt: skip
BF16, F32, F8, I8, I32 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int32
META = torch.device("meta")
H200 = GPUTarget("cuda", 90, 32)
case = ""


def current_target():
    """In place of asking a driver."""
    return H200


current_target.__triton_builtin__ = True  # or kernels that ask for it are said to refer to a global


def compiled(self, *arguments, grid, warmup, **named):
    """In place of JITFunction.run: what the launch would have run, for sm_90."""
    signature, constants, attributes = {}, {}, {}
    options = {name: named.pop(name) for name in [*named] if name not in self.arg_names}
    arguments = (*arguments, *(named.pop(name) for name in self.arg_names[len(arguments) :]))
    for number, (parameter, given) in enumerate(zip(self.params, arguments, strict=True)):
        if parameter.is_constexpr or given is None:
            kind = "constexpr"
        elif isinstance(given, torch.Tensor):
            kind = f"*{TYPES[given.dtype]}"
        else:
            kind = "fp32" if isinstance(given, float) else "i32"
        specialized = kind == "i32" and not parameter.do_not_specialize
        if kind == "constexpr" or (specialized and given == 1):
            kind, constants[number,] = "constexpr", given
        elif kind.startswith("*") or (specialized and given % 16 == 0):
            attributes[number,] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=H200, options=options)
    said = {
        "case": case, "kernel": self.fn.__name__, "shared": made.metadata.shared, "warps": made.metadata.num_warps,
        "products": sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m\S+)|(mma\.sync\S+)", made.asm["ptx"]))),
        "nibbles": made.asm["ptx"].count("lop3.b32 t"),
        "fused": len(re.findall(r"fma\.rn\.f64|div\.(?:full|approx)", made.asm["ptx"])),
        "added": len(re.findall(r"add\.(?:rn\.)?f32", made.asm["ptx"])),
        "narrowed": len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", made.asm["ptx"])),
        "wide": len(re.findall(r"(?:ld|st)\.global\S*\.v4|cp\.async\.cg", made.asm["ptx"])),
    }  # fmt: skip
    print(json.dumps(said), flush=True)


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device=META)


def weight(codes, out=4096, size=4096, group=0, stacked=(), zeros=False):
    """A weight of a large model: ``codes`` dtype, int16 for nibbles in spans of 256."""
    nibbles = codes == torch.int16
    scales = None if codes in {BF16, F32} else empty(*stacked, size // (group or size), out, dtype=F32)
    return PackedWeight(
        size, "nibbles" if nibbles else "plain", empty(*stacked, out, size // (4 if nibbles else 1), dtype=codes), scales,
        empty(*stacked, size // (group or size), out, dtype=I8) if zeros else None, group, 256 if nibbles else 0,
    )  # fmt: skip


def products():
    """Every kind of code and of rows, for decoding and for prompts."""
    global case
    for label, codes, group, fed, size in [
        ("bf16", BF16, 0, BF16, 4096), ("int8 × int8", I8, 0, I8, 4096), ("int4 × bf16", torch.int16, 128, BF16, 4096),
        ("fp8 × fp8", F8, 0, F8, 4096), ("fp8 × fp8 of 4000", F8, 0, F8, 4000),
    ]:  # fmt: skip
        its = weight(codes, size=size, group=group, zeros=label == "int4 × bf16")
        order = default_order(its)
        for count in (1, 4096):
            case = f"{label}, {count} rows"
            tiles = default_tiles(count, order)
            sums, counters = scratch_size(count, its.out, order, tiles)
            scale = empty(count, 1, dtype=F32) if fed in {I8, F8} else None
            linear.linear(
                empty(count, its.size, dtype=fed), its, empty(count, its.out), scale=scale, bias=empty(its.out),
                scratch=Scratch(empty(sums, dtype=F32), empty(counters, dtype=I32)),
            )  # fmt: skip


def mixtures():
    """An op of a mixture of experts after the other."""
    global case
    case = "experts"
    its, tiles = weight(BF16, 1024, 2048, stacked=(64,)), Tiles(rows=64)
    op = ops.Route(logits="l", experts="e", weights="w", top_k=6, score="sigmoid", normalize=True, scale=2.5, groups=8, top_groups=4)
    chosen, size = empty(8, 6, dtype=I32), experts.most_blocks(48, 64, 64)
    experts.route(op, empty(8, 64, dtype=F32), chosen, empty(8, 6, dtype=F32), empty(8, dtype=I32), empty(64, dtype=F32))
    blocks = experts.Blocks(empty(size * 64, dtype=I32), empty(size, dtype=I32), empty(64, dtype=I32))
    experts.tell_apart(chosen, blocks)
    experts.expert_linear(empty(8, 2048), its, empty(8, 6, 1024), blocks, tiles)
    experts.combine(empty(8, 6, 2048), empty(8, 6, dtype=F32), empty(8, 2048), empty(8, dtype=I32))


def row_ops():
    """Row-wise kernels, fused as far as they go."""
    global case
    x, narrow = empty(8, 4096, dtype=F32), empty(8, 4096)
    for label, kind in (("rows to fp8", F8), ("rows", I8)):
        case = label
        to = rows.Rounded(empty(8, 4096, dtype=kind), empty(8, 1, dtype=F32))
        rows.norm(x, empty(4096), BF16, eps=1e-5, group=4096, y=narrow, quantized=to, branch=narrow, added=x)
        rows.gate(narrow, narrow, "gelu", BF16, quantized=to)
        rows.quantize_rows(narrow, to)
    rows.norm(narrow, empty(128), BF16, eps=1e-5, group=128, y=narrow, bias=empty(128), centred=True)
    for kind in ("silu", "gelu_tanh", ClampedSwiglu(alpha=1.7, limit=7.0)):
        rows.gate(narrow, narrow, kind, BF16, y=narrow)
    rows.quantize_fixed(narrow, to, 0.1)
    rows.soft_cap(x, x, 30.0)
    rows.add(x, narrow, x)
    rows.embed(narrow, empty(8, dtype=I32), narrow, factor=2.0)


def attending():
    """Attention in parts over a narrow cache, and whole over latent rows, which take most memory."""
    global case
    for case, heads, kv_heads, key_dim, value_dim, form, visible, programs in [
        ("fp8 in parts", 64, 8, 128, 128, "fp8", SlidingWindow(size=4096), 8), ("latent", 128, 1, 576, 512, "bfloat16", Causal(), 0),
    ]:  # fmt: skip
        latent, blocks = case == "latent", attention.blocks_for(key_dim)
        kept = cache.GroupCache.of(1, 4, kv_heads, key_dim, None if latent else value_dim, form, META)
        room = empty(attention.Parts.numbers(16, heads, value_dim, 4096, blocks), dtype=F32)
        parts = attention.Parts.of(16, heads, value_dim, 4096, programs, room, blocks) if programs else None
        attention.attend(
            empty(16, heads * key_dim), kept.layer(0), empty(16, heads * value_dim), empty(16, dtype=I32), empty(16, dtype=I32),
            empty(4, 16, dtype=I32), empty(16, 2, dtype=I32), heads=heads, scale=0.1, visible=visible, blocks=blocks, parts=parts,
            sinks=empty(heads) if programs else None,
        )  # fmt: skip


def caching():
    """Rows on their way to the cache, and pages on theirs."""
    global case
    case, kept = "fp8", cache.GroupCache.of(1, 4, 8, 128, 128, "fp8", META)
    turn = cache.Turn(empty(64, 64, dtype=F32), empty(64, 64, dtype=F32))
    positions, sequence, pages = empty(64, dtype=I32), empty(64, dtype=I32), empty(4, 16, dtype=I32)
    cache.rotary_tables(positions, empty(64, dtype=F32), turn.cosines, turn.sines)
    qkv = empty(64, 48 * 128)
    q, k, v = qkv.split((32 * 128, 8 * 128, 8 * 128), dim=1)
    cache.rotate_append(q, k, v, empty(64, 32 * 128), turn, kept.layer(0), positions, sequence, pages, heads=32)
    cache.move_pages(StatePool.of(2, 4, (64, 64), META), None, empty(8, 2, dtype=I32))


def recurrences():
    """A recurrence after the other, of the sizes of a large model."""
    global case
    case, count, step = "recurrences", 64, Sequences(empty(64, dtype=I32), empty(65, dtype=I32), empty(64, dtype=I32))

    def state(*shape):
        return StatePool.of(1, 64, shape, META).layer(0)

    def wide(*shape):
        return empty(*shape, dtype=F32)

    scans.causal_conv(empty(count, 8192), empty(8192, 4), empty(count, 8192), state(3, 8192), step, activation="silu")
    scans.selective_scan(
        empty(count, 5120), empty(count, 5120), empty(count, 16), empty(count, 16), wide(5120, 16), wide(5120), wide(5120),
        empty(count, 5120), state(5120, 16), step,
    )  # fmt: skip
    scans.gated_delta_scan(
        empty(count, 2048), empty(count, 2048), empty(count, 4096), empty(count, 32), empty(count, 32), wide(32), wide(32),
        empty(count, 4096), state(32, 128, 128), step, key_heads=16, value_heads=32,
    )  # fmt: skip
    for label, count, sequences in (("decoding", 64, 64), ("prompts", 2048, 8)):
        case, step = label, Sequences(empty(count, dtype=I32), empty(sequences + 1, dtype=I32), empty(sequences, dtype=I32))
        dual_scan.dual_scan(
            empty(count, 5120), empty(count, 80), empty(count, 128), empty(count, 128), wide(80), wide(80), wide(80), empty(count, 5120),
            state(dual_scan.dual_numbers(80, 64, 1, 128, 2)), step, heads=80, groups=1,
        )  # fmt: skip
        linear_scan.linear_scan(
            empty(count, 2048), empty(count, 1024), empty(count, 1024), empty(count, 2048), wide(count, 16),
            state(linear_scan.linear_numbers(8, 128, 128, 2)), step, heads=16, kv_heads=8,
        )  # fmt: skip


def draws():
    """Tokens of a large vocabulary, with every limit."""
    global case
    case = "draws"
    vocab, parts = 128256, sampling.default_parts(8, 128256)
    scratch = sampling.Scratch.of(8, parts, "meta")
    settings, masks = empty(len(FIELDS), 8, dtype=torch.int64), empty(8, vocab // 32, dtype=I32)
    for history in (None, sampling.History.of(8, vocab, "meta")):
        sampling.sample(empty(8, vocab, dtype=F32), masks, settings, empty(8, dtype=I32), scratch, history)
    sampling.feed(empty(64, dtype=I32), empty(8, dtype=I32))


if __name__ == "__main__":
    target_info.current_target = current_target
    JITFunction.run = compiled
    CUDABackend.make_cubin = lambda *_: b""  # as far as PTX: half of the time, and what is looked at
    products()
    mixtures()
    row_ops()
    attending()
    caching()
    recurrences()
    draws()
