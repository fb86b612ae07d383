"""LLM: a model and a backend, ready to complete prompts, many at a time."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.checkpoint import load
from hasten.engine.answer import Completion
from hasten.engine.backends import AUTO, DEVICE, choose_backend, find_loaded, open_session
from hasten.engine.batching import Continuous
from hasten.engine.constraint import Constraints
from hasten.engine.engine import Engine
from hasten.engine.memory import Load, MemoryPlan, added, plan_memory
from hasten.engine.plan import Settings
from hasten.engine.prepare import Prepared, Preparer, Prompt
from hasten.engine.request import Chunk
from hasten.engine.sampling import SamplingParams
from hasten.engine.streams import Streams
from hasten.formats.cache import cache_format
from hasten.model import Model
from hasten.program import Formats

STEP_TOKENS = 512
"""Tokens of a step, at most."""


class LLM:
    """Completes prompts. ``model`` is whatever `hasten.load` takes, or a loaded Model.

    At most ``max_sequences`` run together; the next prompt joins as soon as one ends, unless ``scheduling`` says otherwise. ``context``
    bounds prompt and output (the model's own unless given). ``backend`` is chosen for the model unless given, a GPU where what is planned
    fits there, and ``notice`` says what a user should know of the choice; ``formats`` is how linear layers are stored and fed, and what the
    cache holds; the backend's own unless given. ``memory`` bounds the bytes of all, ``cache_bytes`` those of the cache alone, and
    ``swap_bytes`` is how much more those may take outside it who must wait: none unless given, for here that is the same memory, and as a
    part of the cache it makes nobody wait. `memory_plan` says what they come to before anything is loaded. With ``prefixes`` a prompt is
    computed only from where it differs from what the cache still holds of the same tenant."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        backend: str = AUTO,
        formats: Formats | None = None,
        context: int | None = None,
        max_sequences: int = 16,
        scheduling: Settings | None = None,
        memory: int | None = None,
        cache_bytes: int | None = None,
        swap_bytes: int = 0,
        prefixes: bool = True,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(model)
        longest = self.model.spec.context
        self.context = longest if context is None else context
        if not 1 < self.context <= longest:
            raise ConfigError(f"context {self.context} is out of range; {self.model.name} accepts 2 to {longest}")
        if max_sequences < 1:
            raise ConfigError(f"max_sequences is {max_sequences}; at least 1 is needed")
        self.max_sequences = max_sequences
        self.scheduling = scheduling or continuous(max_sequences)
        self._memory, self._cache_bytes, self._swap_bytes, self._prefixes = memory, cache_bytes, swap_bytes, prefixes
        self.backend, self.notice = choose_backend(self.model, backend, formats)
        self._formats = (formats or Formats()).meant_for(self.model.cache)
        cache = self._formats.cache
        if cache is not None:
            cache_format(cache)  # a wrong name is told at once, not with the first prompt
        self.preparer = Preparer(self.model, context=self.context, slots=self.scheduling.batching.slots, cache=cache)
        self._loads: list[Load] | None = None
        if backend == AUTO and self.backend == DEVICE and (unfit := self._unfit()):
            self.backend, self.notice = choose_backend(self.model, backend, formats, unfit)
            self._loads = None
        self._plans: dict[int, MemoryPlan] = {}
        self._engines: dict[int, Engine] = {}
        if memory is not None:
            self.memory_plan()  # what is not enough is told before anything is loaded
        self._constraints: Constraints | None = None
        self._streams = Streams()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, tenant: str = ""
    ) -> list[Completion]:
        """One Completion per output, in the order of prompts and then of choices (one, unless ``n`` asks for more).

        A prompt is text or token ids; ``params`` is one for all or one per prompt. What fails one output is its ``error``, no other's."""
        ended = dict(self.finished(prompts, params, tenant=tenant))
        return [one for index in sorted(ended) for one in ended[index]]

    def finished(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, tenant: str = ""
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The outputs of each prompt, with its place among them, as soon as all of a prompt's have ended."""
        return self.answered(self._prepared(prompts, params, tenant))

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, tenant: str = ""
    ) -> Iterator[Chunk]:
        """Chunks as they are made; ``index`` and ``choice`` say whose. Every output's last chunk has a finish_reason.

        Outputs that must be compared before any is returned (``best_of``, beam search) come whole, one chunk each."""
        return self._stream(self._prepared(prompts, params, tenant))

    def prepare(
        self, prompt: Prompt, params: SamplingParams | None = None, *, tenant: str = "", priority: int = 0, name: str = "the prompt"
    ) -> Prepared:  # fmt: skip
        """A request that `answered` or an `engine` takes, as `Preparer.prepare` makes it."""
        return self.preparer.prepare(prompt, params or SamplingParams(), tenant=tenant, priority=priority, name=name)

    def answered(self, requests: Sequence[Prepared]) -> Iterator[tuple[int, list[Completion]]]:
        """The outputs of each of ``requests``, with its place among them, as soon as all of its outputs have ended."""
        answers = [one.answer() for one in requests]
        for chunk in self._run(requests):
            answer = answers[chunk.index]
            answer.take(chunk)
            if answer.done:
                yield chunk.index, answer.completions()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, begun as the model's own tokenizer begins it; an empty one is the document start alone."""
        return self.preparer.encode(text)

    def engine(self, context: int | None = None) -> Engine:
        """The engine of the Program for sequences of up to ``context`` tokens, of which LongRoPE models have two; the longest unless
        given. Made when it is first asked for."""
        context = self.preparer.contexts[-1] if context is None else context
        if context not in self._engines:
            cache_bytes = self.memory_plan(context).cache if self._cache_bytes is None else self._cache_bytes
            session = open_session(self.model, self.backend, context, self._formats, cache_bytes)
            self._engines[context] = Engine(
                session, self.scheduling, constraints=None if self.model.tokenizer is None else self._follow(),
                swap_bytes=self._swap_bytes, prefixes=self._prefixes,
            )  # fmt: skip
        return self._engines[context]

    def memory_plan(self, context: int | None = None) -> MemoryPlan:
        """What weights, cache and arena of `engine` take, which need not be there yet; of all its engines unless ``context`` is given.

        Raises UserError where ``memory`` is not enough."""
        if not self._plans:
            loaded = find_loaded(self.backend, self.model)
            plans = plan_memory(self.loads(), memory=self._memory, free=loaded.free_bytes())
            self._plans = dict(zip(self.preparer.contexts, plans))
        return added([*self._plans.values()]) if context is None else self._plans[context]

    @property
    def bounded(self) -> bool:
        """Was it given bytes of its own?"""
        return self._memory is not None or self._cache_bytes is not None

    def _unfit(self) -> str:
        """Why its engines do not fit into the backend's free memory, in words; '' where they do."""
        loads, free = self.loads(), find_loaded(self.backend, self.model).free_bytes()
        try:
            plan = added(plan_memory(loads, memory=self._memory, free=free))
        except UserError as error:
            return str(error)
        cache = plan.cache if self._cache_bytes is None else len(loads) * self._cache_bytes
        if (needed := plan.weights + plan.arena + cache) <= free:
            return ""
        steps = f"steps of up to {self.scheduling.step_tokens:,} tokens"
        needs = f"weights of {plan.weights:,} bytes, a cache of {cache:,} and {steps} take {needed:,}"
        return f"{needs}, and {free:,} are free; give a smaller --max-model-len"

    def loads(self) -> list[Load]:
        """What each of its engines puts into memory, for a planner."""
        if self._loads is None:
            self._loads = self._made_loads()
        return self._loads

    def _made_loads(self) -> list[Load]:
        backend, settings = find_loaded(self.backend, self.model), self.scheduling
        programs = [backend.program(self.model, context, self._formats) for context in self.preparer.contexts]
        tokens = [min(settings.step_tokens, program.context) for program in programs]
        return [
            Load(
                self.model.name, program, backend.weight_bytes(program),
                backend.arena_bytes(program, most) + backend.drawing_bytes(program, settings.batching.slots),
                2 * settings.batching.slots + min(settings.scored_tokens, most),  # the sampler has those that are drawn from once more
                backend.page, self._swap_bytes,
            )
            for program, most in zip(programs, tokens)
        ]  # fmt: skip

    def keep_to(self, plans: Sequence[MemoryPlan]) -> None:
        """Take caches as ``plans`` say, one for each of `loads`. Raises ConfigError where an engine is there already."""
        if self._engines:
            raise ConfigError(f"{self.model.name} has its cache already; plan memory before the first prompt")
        self._plans = dict(zip(self.preparer.contexts, plans, strict=True))

    def _prepared(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, tenant: str
    ) -> list[Prepared]:  # fmt: skip
        many = _as_prompts(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ConfigError(f"{len(each)} SamplingParams for {len(many)} prompts; give one, or one per prompt")
        return [self.prepare(prompt, p, tenant=tenant, name=f"prompt {index}") for index, (prompt, p) in enumerate(zip(many, each))]

    def _stream(self, requests: Sequence[Prepared]) -> Iterator[Chunk]:
        answers = {place: its for place, one in enumerate(requests) if (its := one.answer()).compared}
        for chunk in self._run(requests):
            if (answer := answers.get(chunk.index)) is None:
                yield chunk
            else:
                yield from answer.take(chunk)

    def _run(self, requests: Sequence[Prepared]) -> Iterator[Chunk]:
        """Requests that one Program serves run together, beside those of other streams that are not at their end."""
        places = {one.index: place for place, one in enumerate(requests)}
        for context in self.preparer.contexts:
            if together := [one for one in requests if one.context == context]:
                for chunk in self._streams.run(self.engine(context), together):
                    yield dataclasses.replace(chunk, index=places[chunk.index])

    def _follow(self) -> Constraints:
        """What follows grammars for this model."""
        if self._constraints is None:
            self._constraints = Constraints(self.model.text_tokenizer().path, self.model.spec.vocab, self.model.eos_token_ids)
        return self._constraints


def continuous(slots: int, stretch: float = math.inf) -> Settings:
    """How an LLM schedules unless told: ``slots`` sequences at once; Settings tells of ``stretch``."""
    return Settings(max(STEP_TOKENS, slots), Continuous(slots), stretch=stretch)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and all(isinstance(item, int | np.integer) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    wrong = [item for item in prompts if not isinstance(item, str | Sequence | np.ndarray)]
    if wrong:
        raise ConfigError(f"prompt {one_line(wrong[0])} is neither text nor a list of token ids")
    return list(prompts)  # type: ignore[arg-type]
