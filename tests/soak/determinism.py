"""The determinism contract over all its cells: prompts alone, in batches, cut at random, on one thread and two, give the same tokens.

A cell is a weight format × a kind of model × a cache format. Beside tokens, the bits of all logits that a token was drawn from are
compared, for two logits that differ often give one token."""

import dataclasses
import hashlib
import itertools

import numpy as np

from hasten import _native
from hasten.backends.cpu import CpuBackend, CpuSession
from hasten.backends.cpu.backend import STEP_TOKENS
from hasten.engine import LLM, SamplingParams
from hasten.engine.sampler import native_row
from hasten.engine.stepper import Sequences, Stepper
from hasten.program import Batch, Formats, KvGroup, ops, unfuse
from tests.soak.models import CONTEXT, PARTS, VOCAB, model_of

WEIGHTS = {"bf16": ("bf16", "bf16"), "W8A8": ("int8", "int8"), "W4A8": ("int4", "int8")}
CACHES = ("bf16", "int8")
MOST_TOGETHER = 32
SAMPLED = (
    {"temperature": 0.9}, {"temperature": 1.1, "top_k": 17}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
)  # fmt: skip
"""How every second prompt is drawn, in turn; the others are greedy."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    weights: str
    kind: str
    cache: str

    def __str__(self):
        return f"{self.weights} · {self.kind} · {self.cache} cache"


CELLS = [Cell(*each) for each in itertools.product(WEIGHTS, PARTS, CACHES)]


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    params: SamplingParams


@dataclasses.dataclass
class Making:
    """A prompt on its way: its tokens so far, a digest of the logits each was drawn from, and its part of the native state."""

    prompt: Prompt
    sequence: object
    row: object
    known: list[int]
    tokens: list[int]
    digests: list[bytes]

    @classmethod
    def of(cls, prompt, stepper):
        (sequence,) = stepper.start(1).sequences
        return cls(prompt, sequence, native_row(prompt.params, prompt.ids, prompt.params.seed), list(prompt.ids), [], [])

    @property
    def pending(self):
        return len(self.known) - self.sequence.length

    @property
    def done(self):
        return len(self.tokens) == self.prompt.params.max_tokens


@dataclasses.dataclass
class Fired:
    """What happened, so that a run in which nothing was shared or cut does not count."""

    most_together: int = 0
    cuts: int = 0
    mixed_steps: int = 0
    longest_step: int = 0
    pages_gone: int = 0
    threads: int = 0


def prompts_of(count: int, seed: int) -> list[Prompt]:
    """Seeded prompts of 1 to 90 tokens, more short than long, every second one sampled; a tenth begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, 40).tolist()
    made = []
    for index in range(count):
        ids = rng.integers(0, VOCAB, int(rng.integers(1, 91 if index % 3 == 0 else 24))).tolist()
        if index % 10 == 0:
            ids = (shared + ids)[:90]
        settings = SAMPLED[index // 2 % len(SAMPLED)] if index % 2 else {}
        made.append(Prompt(tuple(ids), SamplingParams(max_tokens=int(rng.integers(4, 17)), seed=int(rng.integers(1 << 62)), **settings)))
    return made


class Player:
    """Plays prompts on one session, and counts what happened."""

    def __init__(self, session: CpuSession):
        self.session, self.stepper, self.fired = session, Stepper(session), Fired(threads=session.threads.threads)
        self._sampler = _native.Sampler(session.threads)

    def _step(self, making: list[Making], sizes: list[int]) -> None:
        """Compute the next ``sizes`` known tokens of each, and draw for those that are then up to date."""
        starts = [one.sequence.length for one in making]
        pieces = [one.known[start : start + size] for one, start, size in zip(making, starts, sizes)]
        whole = Batch.of(pieces, starts, rows="last")
        ready = [index for index, one in enumerate(making) if sizes[index] == one.pending]
        batch = dataclasses.replace(whole, rows=whole.rows[ready])
        logits, _ = self.stepper.step(batch, Sequences(tuple(one.sequence for one in making)))
        fired = self.fired
        fired.most_together = max(fired.most_together, len(making))
        fired.cuts += len(making) - len(ready)
        fired.mixed_steps += min(sizes) == 1 < max(sizes)
        fired.longest_step = max(fired.longest_step, sum(sizes))
        fired.pages_gone = max(fired.pages_gone, *(one.sequence.pages.gone[0] for one in making))
        if ready:
            if not np.isfinite(logits).all():
                raise ValueError("logits are not finite")
            self._draw([making[index] for index in ready], logits)

    def _draw(self, making: list[Making], logits) -> None:
        tokens = np.full(len(making), -1, np.int32)
        self._sampler.sample(logits, [one.row for one in making], np.array([len(one.known) for one in making], np.int64), tokens)
        for one, token, bits in zip(making, tokens.tolist(), logits, strict=True):
            one.row.append(token)
            one.known.append(token)
            one.tokens.append(token)
            one.digests.append(hashlib.blake2b(bits.tobytes(), digest_size=8).digest())
            if one.done:
                one.sequence = None  # its pages are for others

    def alone(self, prompts: list[Prompt]) -> list[Making]:
        """Each by itself: the prompt whole, then token by token."""
        made = []
        for prompt in prompts:
            one = Making.of(prompt, self.stepper)
            while not one.done:
                self._step([one], [one.pending])
            made.append(one)
        return made

    def together(self, prompts: list[Prompt], seed: int) -> list[Making]:
        """In batches of 2 to 32 that prompts join and leave, in an order, in chunks and with pauses drawn from ``seed``; the first is
        large and uncut, so that it is longer than one native step."""
        rng = np.random.default_rng(seed)
        making = [Making.of(prompt, self.stepper) for prompt in prompts]
        waiting, running = rng.permutation(len(prompts)).tolist(), []
        room, whole = min(MOST_TOGETHER, len(prompts) // 2), 1.0
        while waiting or running:
            while waiting and len(running) < room:
                running.append(waiting.pop())
            chosen = rng.permutation(running)[: max(2, room)].tolist()
            taken = [making[index] for index in chosen]
            self._step(taken, [_piece(one.pending, whole, rng) for one in taken])
            running = [index for index in running if not making[index].done]
            room, whole = int(rng.integers(2, MOST_TOGETHER + 1)), 0.3
        return making

    def cut(self, prompts: list[Prompt], seed: int) -> list[Making]:
        """Each by itself, in chunks drawn from ``seed``."""
        rng = np.random.default_rng(seed)
        made = [Making.of(prompt, self.stepper) for prompt in prompts]
        for one in made:
            while not one.done:
                self._step([one], [_piece(one.pending, 0.3, rng)])
        return made


def _piece(pending: int, whole: float, rng) -> int:
    """All of what is pending, with probability ``whole``, or a part of it."""
    return pending if rng.random() < whole else int(rng.integers(1, pending + 1))


class Difference(Exception):
    """Two ways of playing one prompt that do not agree; or a mechanism that never fired."""


def run_cell(cell: Cell, count: int, seed: int = 0, isa: str = "best") -> dict:
    """Play ``count`` prompts in every way; returns what fired and how many tokens were compared. Raises Difference, naming the first."""
    model, prompts = model_of(cell.kind), prompts_of(count, seed)
    weights, activations = WEIGHTS[cell.weights]
    formats = Formats(weights, activations, cell.cache)
    one, two = (Player(CpuBackend(threads=threads, isa=isa).session(model, CONTEXT, formats)) for threads in (1, 2))
    require_cell(cell, one.session)
    expected = one.alone(prompts)
    if len({tuple(each.tokens) for each in expected}) < 0.8 * count:
        raise Difference(f"{cell}: outputs hardly differ between prompts, so equal ones say nothing")
    compared = 0
    for player in (one, two):
        threads = player.fired.threads
        for way, made in (
            ("alone in chunks", player.cut(prompts, seed + threads)), ("in batches", player.together(prompts, seed + 10 + threads))
        ):  # fmt: skip
            compared += require_same(f"{cell}, {way}, {threads} threads", expected, made)
    if isa == "best":
        llm = LLM(model, backend="cpu", formats=formats, context=CONTEXT, max_sequences=MOST_TOGETHER)
        done = llm.generate([each.ids for each in prompts], [each.params for each in prompts])
        for index, (a, b) in enumerate(zip(expected, done, strict=True)):
            if tuple(a.tokens) != b.token_ids:
                raise Difference(f"{cell}, LLM.generate: {first_difference(index, a.tokens, b.token_ids)}")
        compared += sum(len(each.tokens) for each in expected)
    fired = {"one": require_fired(cell, one, count), "two": require_fired(cell, two, count)}
    return {"prompts": count, "tokens": compared, "fired": fired}


def require_cell(cell: Cell, session: CpuSession) -> None:
    """The Program that is played is what the cell's name says."""
    plain = unfuse(session.program)
    linear = [op for op in plain.ops if isinstance(op, ops.Linear | ops.ExpertLinear) and op.y != "logits"]
    weights, activations = WEIGHTS[cell.weights]
    routers = {op.logits for op in plain.ops if isinstance(op, ops.Route)}
    stored = {op.weight_format for op in linear if op.y not in routers}
    fed = {plain.values[op.x].dtype for op in linear if op.y not in routers}
    (group,) = plain.states
    attend = [op for op in plain.ops if isinstance(op, ops.Attend)]
    held = {
        f"weights {stored}": stored == {"dense" if weights == "bf16" else weights},
        f"activations {fed}": fed == {"bfloat16" if activations == "bf16" else activations},
        f"cache {group.format}": isinstance(group, KvGroup) and group.format == {"bf16": "bfloat16"}.get(cell.cache, cell.cache),
        "multi-query": (cell.kind == "multi-query") == all(op.kv_heads == 1 < op.heads for op in attend),
        "grouped-query": cell.kind != "grouped-query" or all(1 < op.kv_heads < op.heads for op in attend),
        "window": (cell.kind == "window") == all(type(op.visible).__name__ == "SlidingWindow" for op in attend),
        "experts": (cell.kind == "MoE") == any(isinstance(op, ops.ExpertLinear) for op in plain.ops),
    }
    if wrong := [name for name, holds in held.items() if not holds]:
        raise Difference(f"{cell} plays something else: {', '.join(wrong)}")


def require_fired(cell: Cell, player: Player, count: int) -> dict:
    """Batches were shared, prompts cut, long and short rows mixed, windows let pages go, and every thread had work."""
    fired = player.fired
    batch = Batch.of([list(range(64))])
    _, _, profile = player.stepper.profile(batch, player.stepper.start(1))
    busy = int((profile.op_ns.sum(axis=0) > 0).sum())
    held = {
        "batches": fired.most_together >= min(24, count // 2),
        "cuts": fired.cuts >= count // 2,
        "mixed steps": fired.mixed_steps > 0,
        "steps longer than a native one": count < 100 or fired.longest_step > STEP_TOKENS,
        "pages that came back": (cell.kind == "window") == (fired.pages_gone > 0),
        f"work on {fired.threads} threads": busy == fired.threads == profile.op_ns.shape[1],
    }
    if never := [name for name, holds in held.items() if not holds]:
        raise Difference(f"{cell}: never happened on {fired.threads} threads: {', '.join(never)} ({fired})")
    return dataclasses.asdict(fired)


def require_same(what: str, expected: list[Making], made: list[Making]) -> int:
    """How many tokens agree, all of them. Raises Difference."""
    for index, (a, b) in enumerate(zip(expected, made, strict=True)):
        if a.tokens != b.tokens or a.digests != b.digests:
            same = first_difference(index, a.tokens, b.tokens) if a.tokens != b.tokens else first_difference(index, a.digests, b.digests)
            raise Difference(f"{what}: {same}")
    return sum(len(each.tokens) for each in expected)


def first_difference(index: int, a, b) -> str:
    """Where two outputs of prompt ``index`` part."""
    at = next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    shown = [repr(each[at].hex() if isinstance(each[at], bytes) else each[at]) if at < len(each) else "nothing" for each in (a, b)]
    kind = "logits" if a and isinstance(a[0], bytes) else "token"
    return f"prompt {index}, {kind} {at} is {shown[1]}; alone on one thread it is {shown[0]}"
