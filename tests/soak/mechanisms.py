"""The determinism contract over what the engine does: prompts each alone, and then all of them by every mechanism, give the same tokens.

A cell is a model × a way. `tests.soak.determinism` has formats, chunks and threads, and compares logits too; here are batches, places in
them, chunks, prefixes that are found, preemption by computing again and by swapping, and padded batches, each asserted to have happened."""

import dataclasses
from collections.abc import Callable

import numpy as np

from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.engine.answer import Completion
from hasten.engine.batching import ByPriority, Continuous, Dynamic, Static
from hasten.engine.plan import Costs, Counters, Settings, StepPlan
from hasten.engine.scheduler import Scheduler
from hasten.model import Model
from hasten.program import Formats
from tests.soak.determinism import Difference, first_difference
from tests.soak.models import CONTEXT, model_of

FEWEST = 44
"""Prompts without which not everything happens."""
SHARED, SHORT = 80, 30  # tokens that prompts have in common; of 44 prompts the last 14 are short, with long outputs


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, and how it is stored."""

    make: Callable[[], Model]
    weights: str


KINDS = {
    "code-8m W8A8": Kind(lambda: load("code-8m"), "int8"),
    "window bf16": Kind(lambda: model_of("window"), "bf16"),
    "MoE bf16": Kind(lambda: model_of("MoE"), "bf16"),
}


@dataclasses.dataclass(frozen=True)
class Way:
    """What the engine is told, pages it has and may swap to, in which order prompts come, and whether that made happen what it should.

    Prompts come in ``waves``, each of a priority above the last one's, once an answer of that is there; how many were ``cut`` by what a
    step may take of time must be more than so many."""

    settings: Settings | None
    fired: Callable[[Counters, int], bool]
    pages: int | None = None
    outside: int = 0
    prefixes: bool = True
    order: int | None = None
    waves: int = 1
    cut: int | None = None


SCARCE = Settings(64, Continuous(12), output_share=0.0)
WAYS = {
    "batches": Way(None, lambda c, n: c.shared_steps > 0.8 * c.steps),
    "other places": Way(Settings(512, Continuous(29)), lambda c, n: c.shared_steps > 0.8 * c.steps, order=5),
    "small chunks": Way(Settings(7, Continuous(5)), lambda c, n: c.steps > 4 * n),
    "chunks by time": Way(Settings(256, Continuous(16), stretch=1.5), lambda c, n: c.shared_steps > 0.8 * c.steps, cut=3),
    "no prefixes": Way(None, lambda c, n: c.hit_tokens == 0, prefixes=False),
    "prefixes": Way(Settings(160, Continuous(3)), lambda c, n: c.hit_tokens > 7 * n),
    "preemption": Way(SCARCE, lambda c, n: c.recomputed > n // 50 and not c.swapped, pages=20),
    "swaps": Way(dataclasses.replace(SCARCE, costs=Costs(1.0, 0.0)), lambda c, n: c.swapped > n // 50, pages=20, outside=400),
    "static": Way(Settings(256, Static(6)), lambda c, n: c.padding_tokens > n // 2),
    "dynamic": Way(Settings(256, Dynamic(6, 0.0)), lambda c, n: c.padding_tokens > n // 2),
    # Pages are plenty: who gives up his has given way to one of a better rank.
    "priorities": Way(Settings(64, Continuous(4), order=ByPriority(1e6)), lambda c, n: c.recomputed > 2, waves=3),
}


def prompts_of(vocab: int, count: int, seed: int) -> list[list[int]]:
    """Prompts of 3 to 140 tokens, every other one beginning alike, and among them short ones."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab, SHARED).tolist()
    made = []
    for index in range(count):
        long = index % FEWEST < SHORT
        own = rng.integers(0, vocab, int(rng.integers(3, 60 if long else 11))).tolist()
        made.append(shared + own if index % 2 and long else own)
    return made


def params_of(count: int, seed: int) -> list[SamplingParams]:
    """Greedy and seeded by turns, of 1 to 24 tokens, of 45 for short prompts."""
    return [
        SamplingParams(
            max_tokens=1 + index * 7 % 24 if index % FEWEST < SHORT else 45, temperature=index % 3 / 2, seed=seed + index, top_p=0.9,
            ignore_eos=True,
        )
        for index in range(count)
    ]  # fmt: skip


class Same:
    """One model's prompts, and what each of them gives alone."""

    def __init__(self, kind: str, count: int, seed: int = 0) -> None:
        self.kind, self.count, self.model = kind, count, KINDS[kind].make()
        self.formats = Formats(KINDS[kind].weights)
        self.context = min(256, CONTEXT)
        self.prompts, self.params = prompts_of(self.model.spec.vocab, count, seed), params_of(count, seed)
        self._expected: list[tuple[int, ...]] = []

    @property
    def expected(self) -> list[tuple[int, ...]]:
        """Tokens of each prompt alone, one request at a time, from an empty cache."""
        if not self._expected:
            alone = LLM(self.model, backend="cpu", formats=self.formats, context=self.context, max_sequences=1, prefixes=False)
            self._expected = [alone.generate([prompt], each)[0].token_ids for prompt, each in zip(self.prompts, self.params)]
            if len({*self._expected}) < self.count // 2:
                raise Difference(f"{self.kind}: outputs hardly differ between prompts, so equal ones say nothing")
        return self._expected

    def run(self, way: str) -> dict:
        """Play all prompts that way; how many tokens were compared, and what happened. Raises Difference, naming the first."""
        asked = WAYS[way]
        page = 16 * sum(group.bytes_per_token() for group in CpuBackend().program(self.model, 64, self.formats).states)
        llm = LLM(
            self.model, backend="cpu", formats=self.formats, context=self.context, scheduling=asked.settings, prefixes=asked.prefixes,
            cache_bytes=None if asked.pages is None else asked.pages * page, swap_bytes=asked.outside * page,
        )  # fmt: skip
        order = list(range(self.count))
        if asked.order is not None:
            np.random.default_rng(asked.order).shuffle(order)
        cuts = count_cuts(llm.engine().scheduler)
        done = self._play(llm, [order[wave :: asked.waves] for wave in range(asked.waves)])
        counters, pools = llm.engine().counters, llm.engine().cache.pools
        for index in order:
            one = done[index]
            if one.error is not None:
                raise Difference(f"{self.kind}, {way}: prompt {index}: {one.error}")
            if one.token_ids != self.expected[index]:
                raise Difference(f"{self.kind}, {way}: {first_difference(index, self.expected[index], one.token_ids)}")
        if not asked.fired(counters, self.count) or (asked.cut is not None and len(cuts) <= asked.cut):
            raise Difference(f"{self.kind}: never happened: {way} ({len(cuts)} prompts cut, {counters})")
        if [pool.available for pool in pools] != [pool.pages for pool in pools]:
            raise Difference(f"{self.kind}, {way}: pages are lost")
        return {"tokens": sum(map(len, self.expected)), "fired": dataclasses.asdict(counters) | {"cut": len(cuts)}}

    def _play(self, llm: LLM, waves: list[list[int]]) -> dict[int, Completion]:
        """What each prompt gives; a wave comes when the one before it has its first answer."""
        done, streams = {}, []
        for priority, wave in enumerate(waves):
            stream = llm.answered([llm.prepare(self.prompts[index], self.params[index], priority=priority) for index in wave])
            place, (first,) = next(stream)
            done[wave[place]] = first
            streams.append((wave, stream))
        for wave, stream in streams:
            done.update((wave[place], one) for place, (one,) in stream)
        return done


def count_cuts(scheduler: Scheduler) -> list[int]:
    """Grows, while ``scheduler`` plans, by a sequence whenever its prompt is cut though the step's budget would have taken more of it."""
    cuts, plan = list[int](), scheduler.plan

    def watched(*arguments, **named) -> StepPlan:
        made = plan(*arguments, **named)
        if sum(len(entry.tokens) for entry in made.entries) < scheduler.settings.step_tokens:
            cuts.extend(entry.sequence for entry in made.entries if not entry.draws)
        return made

    scheduler.plan = watched
    return cuts
