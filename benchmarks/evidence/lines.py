"""What the measured tables ask for, as data: each line says what is measured, by which commands, how their JSON is read, and what is
asked. A line whose commands another line has too shares their runs."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.evidence.figures import (
    BestPeer,
    Field,
    Inside,
    LeastR2,
    LeastStep,
    Memory,
    OverBound,
    Passes,
    PeersAtBatch,
    Ratio,
    Recovered,
)

Row = dict[str, Any]


class Figure(Protocol):
    """Reads one number from what the commands printed: rows[round][command] is a list of JSON objects."""

    def of(self, rounds: Sequence[Sequence[Sequence[Row]]]) -> float: ...


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a figure is asked to be."""

    sense: str  # "≥" or "≤"
    value: float

    def holds(self, figure: float) -> bool:
        return figure >= self.value if self.sense == "≥" else figure <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:g}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table. In ``commands``, which run in turn ``rounds`` times, {model} and {shape} stand for the model of the table,
    {environments} and {work} for where peers live, {output} for a file that is read instead of what is printed.

    ``needs`` names the level of kernels without which there is no such figure, '' where all have one. ``asked`` is None
    where nothing is."""

    table: str
    check: str
    commands: tuple[str, ...]
    figure: Figure
    asked: Bound | None = None
    rounds: int = 1
    unit: str = ""
    needs: str = ""


def least(value: float) -> Bound:
    return Bound("≥", value)


def most(value: float) -> Bound:
    return Bound("≤", value)


LATENCY = "hasten bench latency {model} --weights %s --batch %d --prompt %d --new %d --repeats %d --json"
NAMES = {"bf16": "bf16", "int8": "W8A8", "int4": "W4A8"}
PASSED = most(0)

DECODE = [
    Line("B", f"decode, batch 1, context {context}, {NAMES[weights]}: bytes a second over streaming read",
         (LATENCY % (weights, 1, context, 32, 5),), Field("mbu"), least(asked))
    for context, asks in ((128, {"bf16": 0.85, "int8": 0.85, "int4": 0.80}), (2048, dict.fromkeys(NAMES, 0.75)))
    for weights, asked in asks.items()
]  # fmt: skip
PREFILL = [
    Line("B", f"prefill 512, {NAMES[weights]}: operations a second over the tiles' peak", (LATENCY % (weights, 1, 512, 4, 5),),
         Field("mfu"), least(asked), needs="amx")
    for weights, asked in (("bf16", 0.55), ("int8", 0.45))
]  # fmt: skip
BATCHES = [
    Line("B", f"batch {batch}, context 128, {NAMES[weights]}: over its own limit", (LATENCY % (weights, batch, 128, 16, 3),),
         Field("of_limit"), asked)
    for batch, asked in ((8, None), (32, least(0.70))) for weights in NAMES
]  # fmt: skip
SPARSE = [
    Line(
        issue, f"decode, batch 1, {zeros} of the weights zero, {NAMES[weights]}: sparse over dense",
        tuple(f"hasten bench latency {{model}}@{zeros} --weights {form} --prompt 16 --new 32 --repeats 1 --json"
              for form in (f"{weights}-sparse", weights)),
        Ratio("decode_tokens_per_s"), least(asked), rounds=5,
    )
    for issue, zeros, (weights, asked) in (
        *itertools.product("B", ("50%", "2:4"), (("bf16", 1.5), ("int8", 1.3))),
        ("F", "2:4", ("int4", 1.1)),
    )
]  # fmt: skip
CONTEXT = "hasten bench context {model} --weights %s --cache %s --context 128,1024,2048,4096,8192,16384,24576,32768 --json"
CONTEXTS = [
    line
    for weights, cache in (("bf16", "bf16"), ("int8", "int8"))
    for line in (
        Line("B", f"context 128 to 32,768, {NAMES[weights]}, {cache} cache: step time against length, R² of a straight line",
             (CONTEXT % (weights, cache),), LeastR2("context", "tpot_ms"), least(0.99)),
        Line("B", f"context 128 to 32,768, {NAMES[weights]}, {cache} cache: memory over weights + arena + cache, farthest from 1",
             (CONTEXT % (weights, cache),), Memory(), most(0.05)),
    )
]  # fmt: skip
PEERS = "python benchmarks/peers/compare.py --shape {shape} --environments {environments} --work {work} --json {output}"
BESIDE_PEERS = [
    *(
        Line("B", f"{what}, {bits}: over the best peer at the same bits", (PEERS,), BestPeer(bits, what), least(asked), unit="×")
        for bits, asks in (("bf16", (1.25, 1.6, 2)), ("int8", (2, 3, 3)), ("int4", (2, 3, 3)))
        for what, asked in zip(("batch 1", "batch 8", "prefill"), asks)
    ),
    *(
        Line("B", f"batch 32, {bits}: over the best peer in any format", (PEERS,), PeersAtBatch(bits, "batch 32"), least(asked), unit="×")
        for bits, asked in (("bf16", 1.5), ("int4", 2.5))
    ),
]  # fmt: skip
START = [
    Line("B", "second start of the W4A8 model to its first token, files in the page cache",
         ("python benchmarks/first_token.py {model} --weights int4",), Field("second_start_s"), most(1.5), unit=" s"),
    Line("B", "step cost outside kernels, code-8m, batch 1", ("hasten bench latency code-8m --prompt 128 --new 32 --repeats 5 --json",),
         Field("step_overhead_us"), most(60), unit=" µs"),
    Line("B", "building the extension from nothing", ("python benchmarks/build_time.py",), Field("seconds"), most(90), unit=" s"),
]  # fmt: skip
LOSS = [
    Line("B", f"held-out loss, code-8m, weights {weights}", (f"hasten eval code-8m --weights {weights} --json",), Field("loss"))
    for weights in ("bf16", "int8", "int4", "int4-g64", "int4-g32-zp", "int3-g32", "int2-g32-zp", "fp8")
]
LOSS += [
    Line(
        "B", f"held-out loss, code-8m, bf16, cache {cache}", (f"hasten eval code-8m --weights bf16 --cache {cache} --json",), Field("loss")
    )
    for cache in ("int8", "fp8")
]
CACHED = [
    Line("C", "int8 cache: bytes of a token in bf16 over those in int8",
         tuple(f"hasten inspect {{model}} --cache {cache} --json" for cache in ("bf16", "int8")),
         Ratio("cache_bytes_per_token"), least(1.9), unit="×"),
    Line("C", "sequences that an int8 or fp8 cache holds where bf16 holds 32, heads of 64 and 128: 1.9 times as many",
         ("pytest tests/engine/test_memory.py -k twice_as_many",), Passes(), PASSED),
    Line("C", "held-out loss, code-8m: int8 cache over bf16",
         tuple(f"hasten eval code-8m --cache {cache} --json" for cache in ("int8", "bf16")),
         Ratio("loss"), most(1.002), unit="×"),
]  # fmt: skip
TESTED = [
    Line("B", check, (command,), Passes(), PASSED)
    for check, command in (
        ("generates where torch cannot be imported", "pytest tests/rules/test_without_torch.py"),
        ("every op, format and level against the reference",
         "pytest tests/ops/test_weight_formats.py tests/ops/test_native_linear.py tests/ops/test_native_decoder.py"
         " tests/ops/test_native_row_ops.py tests/ops/test_native_experts.py tests/ops/test_cpu_backend.py"),
        ("determinism: differing tokens over all cells", "python -m tests.soak determinism"),
        ("native tests under AddressSanitizer and UndefinedBehaviorSanitizer", "make sanitize"),
        ("hostile steps are Python errors", "pytest tests/ops/test_native_hostile.py"),
    )
]  # fmt: skip
BATCHED = "hasten bench throughput {model} --weights int4 --requests 96 --slots 32 --output-min 16 --output-max 512 --batching %s --json"
PREFIXED = "hasten bench throughput code-8m --requests 32 --slots 32 --prompt 16 --shared-prefix 1024 --output-min 2 --output-max 2 --json"
WASTED = "hasten bench throughput code-8m --requests 96 --slots 32 --prompt 128 --output-min 16 --output-max 512 --json"
HOSTILE = "python benchmarks/hostile_grammar.py"
BESIDE_LONG = "python benchmarks/long_prompts.py"
ENGINE = [
    Line("C", "continuous over static batching, 96 requests, 32 slots, outputs log-uniform 16–512, W4A8: of what the drawn lengths allow",
         (BATCHED % "continuous", BATCHED % "static"), OverBound("tokens_per_s", "bound_measured"), least(0.9)),
    Line("C", "the same: times as many tokens a second", (BATCHED % "continuous", BATCHED % "static"), Ratio("tokens_per_s"), unit="×"),
    Line("C", "32 requests sharing a prefix of 1,024 tokens, code-8m: mean time to the first token with the prefix cache over without",
         (f"{PREFIXED} --prefix-cache on", f"{PREFIXED} --prefix-cache off"), Ratio("ttft_mean_s"), most(0.2), rounds=3),
    Line("C", "page waste, pages of 16, code-8m: mean over steps", (WASTED,), Field("page_waste"), most(0.04)),
    Line("C", "page waste: the step with the most", (WASTED,), Field("page_waste_most")),
    Line("C", "page waste: mean tokens of a sequence meanwhile", (WASTED,), Field("mean_tokens"), least(200)),
    Line("C", "plan + commit + detokenize, 64 running sequences",
         ("python benchmarks/engine_step.py",), Field("step_ms"), most(1), unit=" ms"),
    Line("C", "a prompt of 4,000 tokens beside 16 streams, smollm2-135m W4A8: p99 of their gaps over a step of theirs alone",
         (BESIDE_LONG,), Field("p99_over_step"), most(2), unit="×"),
    Line("C", "the same: seconds until the prompt's first token", (BESIDE_LONG,), Field("prompt_s"), unit=" s"),
    Line("C", "a hostile grammar: seconds until its own request has failed", (HOSTILE,), Field("failed_s"), most(2), unit=" s"),
    Line("C", "a hostile grammar: neighbours' time for a token over that without",
         (HOSTILE,), Field("neighbours_ratio"), most(1.2), unit="×"),
    Line("C", "10,000 simulated runs of scheduler and cache, planted faults found",
         ("pytest tests/pure/test_simulation.py",), Passes(), PASSED),
    Line("C", "1,000 prompts by every mechanism of the engine, dense, window, MoE: differing tokens", ("python -m tests.soak engine",),
         Passes(), PASSED),
]  # fmt: skip
TRAINING = [
    Line("A", "training step, code-8m, bf16, 16 × 512: speed over a hand-written module", ("python benchmarks/training_step.py",),
         Field("speed_ratio"), unit="×"),
]  # fmt: skip
THROUGHPUT = [
    Line("D", f"server throughput over the engine called directly, 32 streams, {NAMES[weights]}",
         (f"python -m benchmarks.serve_throughput {{model}} --weights {weights}",), Field("served_over_direct"), least(asked))
    for weights, asked in (("bf16", 0.95), ("int4", 0.90))
]  # fmt: skip
RESPONSES = [
    Line("D", f"response cache, a repeated prompt, 64 tokens, W4A8: {check}",
         ("python -m benchmarks.response_cache {model} --weights int4",), Field(field), asked, unit=unit)
    for check, field, asked, unit in (
        ("computed over answered from it", "computed_over_hit", least(50), "×"),
        ("a hit at the server", "hit_server_ms", most(2), " ms"),
        ("a hit at its client", "hit_client_ms", None, " ms"),
    )
]  # fmt: skip
RECALLED = [
    Line("D", check, (command,), Passes(), PASSED)
    for check, command in (
        ("no wrong hit in 10,000 near misses, and 200 through HTTP",
         "pytest tests/serve/test_response_cache.py tests/serve/test_recall.py -k near_miss"),
        ("two servers with one Redis that dies and returns", "pytest tests/serve/test_recall.py -k redis"),
    )
]  # fmt: skip

LOADED = [
    Line("D", check, (f"python -m tests.soak {part}",), Passes(), PASSED)
    for check, part in (
        ("10,000 malformed requests: no 5xx, no restart, no page lost", "requests"),
        ("bombs on every route: refused, memory at rest within 64 MiB", "bombs"),
        ("1,000 idle sockets change nothing", "slowloris"),
        ("two tenants share nothing, and times tell nothing, 1,000 pairs", "tenants"),
        ("hostile neighbours change no byte", "neighbours"),
        ("1,000 clients that go away anywhere leave nothing", "disconnects"),
        ("ten times too much: refused within 50 ms, first tokens within twice, goodput 0.9", "overload"),
        ("an end under 64 streams cuts none", "drain"),
        ("50 engines killed under 64 streams", "kill"),
    )
]
COMPRESSION = "python -m benchmarks.compression.compare --environments {environments} --work {work}/compression --json {output}"
QUANTIZING = "python -m benchmarks.quantize_memory {model}"
COMPRESSED = [
    *(
        Line("E", f"{method.upper()}, W4A16 in groups of 64, code-8m: held-out loss over llm-compressor's from the same windows",
             (COMPRESSION,), Field(f"{method}_over_peer"), most(1), unit="×")
        for method in ("gptq", "awq")
    ),
    Line("E", "quantize killed at ten random points and gone on with: every byte the same", ("python -m tests.soak quantize",),
         Passes(), PASSED),
    Line("E", "GPTQ of a checkpoint on disk, 16 windows of 512: most resident memory, mapped files among it, over the checkpoint",
         (QUANTIZING,), Field("resident_over_checkpoint"), most(1.3), unit="×"),
    Line("E", "the same: most anonymous memory", (QUANTIZING,), Field("anonymous_over_checkpoint"), unit="×"),
    Line("E", "the same: seconds a block", (QUANTIZING,), Field("seconds_a_block"), unit=" s"),
]  # fmt: skip
STEPPED = "hasten bench latency {model} --weights bf16,int8,int4%s --batch %s --prompt %d --new %d --repeats 3 --json"
SMALLER = [
    Line("E", f"bf16 → {' → '.join(names)}, {check}: speed over the step before, where it is least",
         (STEPPED % (activations, batches, prompt, new),), LeastStep(key, batch, ("bf16", "int8", "int4")), least(1), unit="×")
    for names, activations in ((("W8A8", "W4A8"), ""), (("W8A16", "W4A16"), " --activations bf16"))
    for check, batches, prompt, new, key, batch in (
        ("decode, batch 1", "1,8,32", 16, 8, "decode_tokens_per_s", 1), ("decode, batch 8", "1,8,32", 16, 8, "decode_tokens_per_s", 8),
        ("decode, batch 32", "1,8,32", 16, 8, "decode_tokens_per_s", 32), ("prefill 128", "1", 128, 2, "prefill_tokens_per_s", 1),
    )
]  # fmt: skip
MADE = "python -m benchmarks.smaller %s"
LEARNS = " --minutes 4"  # of the 10, and for students 25, that are allowed
STEPS = "--steps 100"  # of 2,048 tokens
HEALED = f"-healed{LEARNS}"
STUDENT = MADE % f"student{LEARNS}"
LEARNED = [
    Line("F", "a student with half the block parameters, 4 minutes: top-1 over the teacher's", (STUDENT,),
         Field("retained"), least(0.96)),
    Line("F", "that student: tokens a second at batch 1 over the teacher's", (STUDENT,), Inside("decode", "median"), least(1.45), unit="×"),
    Line("F", "that student: bytes of all weights over the teacher's", (STUDENT,), Inside("bytes", "all"), most(0.62)),
    Line("F", "soft labels and labels over labels alone, as long: loss",
         tuple(MADE % f"{name}{LEARNS}" for name in ("student", "student-labels")), Ratio("loss"), most(1), unit="×"),
    *(
        Line("F", f"{kind} over labels alone, as many steps: loss",
             tuple(MADE % f"{name} {STEPS}" for name in (f"student-{kind}", "student-labels")), Ratio("loss"), most(1), unit="×")
        for kind in ("features", "online", "mutual")
    ),
    *(
        Line("F", f"{share} % unstructured, {method} over magnitude: loss",
             tuple(MADE % f"{each}-{share}" for each in (method, "magnitude")), Ratio("loss"), most(1), unit="×")
        for share in (50, 70, 90) for method in ("wanda-matrix", "sparsegpt")
    ),
    *(
        Line("F", f"{what}, healed 4 minutes: loss over the original's, less 1", (MADE % f"{name}{HEALED}",), Field("increase"),
             most(asked))
        for what, name, asked in (("50 %", "sparsegpt-50", 0.04), ("2:4", "sparsegpt-2of4", 0.08))
    ),
    *(
        line
        for what, part in (("neurons", "feed_forward"), ("kv-heads", "mixer"), ("width", "all"), ("layers", "blocks"))
        for line in (
            Line("F", f"{what} cut by 25 %, healed 4 minutes: top-1 over the original's", (MADE % f"{what}-25{HEALED}",), Field("retained"),
                 least(0.96)),
            Line("F", f"{what} cut by 25 %: bytes of {part} over the original's", (MADE % f"{what}-25{HEALED}",),
                 Inside("bytes", part), most(0.75)),
        )
    ),
    *(
        line
        for form in ("int4-g64", "int3-g64")
        for line in (
            Line("F", f"{form}, 4 minutes of text and original: share of what round-to-nearest loses that is recovered",
                 (MADE % f"qat-{form}{LEARNS}", MADE % f"rtn-{form}"), Recovered(), least(0.9)),
            Line("F", f"{form}, 4 minutes of text and original: loss over GPTQ's", (MADE % f"qat-{form}{LEARNS}", MADE % f"gptq-{form}"),
                 Ratio("loss"), most(1), unit="×"),
        )
    ),
    *(
        line
        for what, name in (("pairs of layers share, healed", f"shared-pairs{HEALED}"), ("rank cut 30 %, healed", f"rank-30{HEALED}"),
                           ("codebooks of 16", "codebook-16"))
        for line in (
            Line("F", f"{what}: loss over the original's, less 1", (MADE % name,), Field("increase")),
            Line("F", f"{what}: bytes of blocks over the original's", (MADE % name,), Inside("bytes", "blocks")),
        )
    ),
    *(
        line
        for what, name in (("one key/value head", f"one-kv-head{HEALED}"), ("latent attention", f"latent{HEALED}"))
        for line in (
            Line("F", f"{what}, healed 4 minutes: top-1 over the original's", (MADE % name,), Field("retained"), least(0.96)),
            Line("F", f"{what}: bytes of a token in the cache over the original's", (MADE % name,), Field("cache_bytes"), most(0.5)),
        )
    ),
]  # fmt: skip
LEARNED += [
    Line("F", "every result: provenance, the server's tokens those of the engine, transformers' logits where it can express it",
         ("python -m benchmarks.results",), Passes(), PASSED)
]  # fmt: skip
LINES: list[Line] = [
    *DECODE, *PREFILL, *BATCHES, *SPARSE, *CONTEXTS, *START, *LOSS, *CACHED, *TESTED, *ENGINE, *BESIDE_PEERS, *TRAINING,
    *THROUGHPUT, *RESPONSES, *RECALLED, *LOADED, *COMPRESSED, *SMALLER, *LEARNED,
]  # fmt: skip
