"""LLM: a model and a backend, ready to complete prompts, many at a time."""

import dataclasses
import itertools
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.base import hardware
from hasten.base.errors import ConfigError, MissingExtraError, UnsupportedError, one_line
from hasten.checkpoint import load
from hasten.engine.batching import Continuous
from hasten.engine.choices import best_choices
from hasten.engine.constraint import Constraints
from hasten.engine.detokenize import Detokenizer, byte_token_ids
from hasten.engine.draw import TokenLogprob
from hasten.engine.engine import Engine
from hasten.engine.memory import MemoryPlan, plan_memory
from hasten.engine.plan import NeverFitsError, Settings
from hasten.engine.request import Chunk, FinishReason, Request
from hasten.engine.sampling import SamplingParams, check_ids
from hasten.engine.search import Search
from hasten.engine.session import Session
from hasten.formats.cache import cache_format
from hasten.model import Model, find_backend, load_backend
from hasten.program import Batch, Formats, lowering_contexts, token_array

Prompt = str | Sequence[int]

AUTO = "auto"
"""The backend that is best for a model on this machine."""

STEP_TOKENS = 512
"""Tokens of a step, at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixKey:
    """What two requests must have in common to share what they begin with, beside the tokens."""

    model: str
    cache: str | None
    adapter: str = ""
    exits: str = ""
    tenant: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One output. ``finish_reason`` is 'stop' (end of text, of a grammar, stop string or stop token), 'length', or 'error', and ``error``
    then says what was wrong with this one; ``choice`` is its place among the outputs of its prompt; log-probabilities where asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


class LLM:
    """Completes prompts. ``model`` is whatever `hasten.load` takes, or a loaded Model.

    At most ``max_sequences`` run together; the next prompt joins as soon as one ends, unless ``scheduling`` says otherwise. ``context``
    bounds prompt and output (the model's own unless given). ``backend`` is chosen for the model unless given, and ``notice`` says what a
    user should know of the choice; ``formats`` is how linear layers are stored and fed, and what the cache holds; the backend's own unless
    given. ``memory`` bounds the bytes of all, ``cache_bytes`` those of the cache alone, and ``swap_bytes`` is how much more those may take
    outside it who must wait: none unless given, for here that is the same memory, and as a part of the cache it makes nobody wait.
    `memory_plan` says what they come to before anything is loaded. With ``prefixes`` a prompt is computed only from where it differs from
    what the cache still holds."""

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
        self.scheduling = scheduling or Settings(max(STEP_TOKENS, max_sequences), Continuous(max_sequences))
        self._memory, self._cache_bytes, self._swap_bytes, self._prefixes = memory, cache_bytes, swap_bytes, prefixes
        self.backend, self.notice = choose_backend(self.model, backend, formats)
        self._formats = formats
        if formats is not None and formats.cache is not None:
            cache_format(formats.cache)  # a wrong name is told at once, not with the first prompt
        self._contexts = lowering_contexts(self.model.spec, self.context)
        if memory is not None:
            self.memory_plan()  # what is not enough is told before anything is loaded
        self._engines: dict[int, Engine] = {}
        self._constraints: Constraints | None = None
        self._numbers = itertools.count()  # of prompts, over all calls
        self._news: dict[int, deque[Chunk]] = {}  # by prompt: where its stream takes its chunks from

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """One Completion per output, in the order of prompts and then of choices (one, unless ``n`` asks for more).

        A prompt is text or token ids; ``params`` is one for all or one per prompt. What fails one output is its ``error``, no other's."""
        ended = dict(self.finished(prompts, params))
        return [one for index in sorted(ended) for one in ended[index]]

    def finished(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The outputs of each prompt, with its place among them, as soon as all of a prompt's have ended."""
        prepared = self._requests(prompts, params)
        answers = [[_Answer(output) for output in outputs] for outputs in prepared]
        for chunk in self._run(prepared):
            its = answers[chunk.index]
            its[chunk.choice].take(chunk)
            if all(answer.finish_reason is not None for answer in its):
                yield chunk.index, _returned(its)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Chunk]:
        """Chunks as they are made; ``index`` and ``choice`` say whose. Every output's last chunk has a finish_reason.

        Outputs that must be compared before any is returned (``best_of``, beam search) come whole, one chunk each."""
        return self._stream(self._requests(prompts, params))

    def _stream(self, prepared: Sequence[Sequence[Request]]) -> Iterator[Chunk]:
        compared = {
            index: [_Answer(output) for output in outputs]
            for index, outputs in enumerate(prepared)
            if outputs[0].params.choices > outputs[0].params.n
        }
        for chunk in self._run(prepared):
            if (answers := compared.get(chunk.index)) is None:
                yield chunk
                continue
            answers[chunk.choice].take(chunk)
            if all(answer.finish_reason is not None for answer in answers):
                yield from (_as_chunk(chunk.index, one) for one in _returned(answers))

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:  # fmt: skip
        """The outputs to make, prompt by prompt."""
        many = _as_prompts(prompts)
        each = [params or SamplingParams()] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ConfigError(f"{len(each)} SamplingParams for {len(many)} prompts; give one, or one per prompt")
        return [self._choices(index, prompt, p) for index, (prompt, p) in enumerate(zip(many, each))]

    def _choices(self, index: int, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """The outputs to make of one prompt."""
        ids = self.prompt_ids(prompt, f"prompt {index}")
        self.check_params(params)
        needed = min(len(ids) + params.max_tokens, self.context)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        number = next(self._numbers)
        return [
            Request(
                number, ids, params, limit=self.context, end_ids=frozenset(self.model.eos_token_ids), detokenizer=self._detokenizer(),
                program_context=next(context for context in self._contexts if needed <= context), choice=choice, seed=seed,
            )
            for choice in range(params.choices)
        ]  # fmt: skip

    def _follow(self) -> Constraints:
        """What follows grammars for this model."""
        if self._constraints is None:
            self._constraints = Constraints(self.model.text_tokenizer().path, self.model.spec.vocab, self.model.eos_token_ids)
        return self._constraints

    def check_params(self, params: SamplingParams) -> None:
        """Raises ConfigError or UnsupportedError for what this model cannot be asked for."""
        check_ids(params, self.model.spec.vocab)
        if params.stop or params.grammar is not None or params.echo:
            self.model.text_tokenizer()  # these need text
        if params.beam is not None and params.grammar is not None and not self.model.eos_token_ids:
            raise ConfigError(
                f"beam search with a grammar needs an end of text, which {self.model.name} has none of; leave one of them out"
            )

    def prompt_ids(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """Token ids of a prompt, which is called ``name`` in errors. Raises ConfigError for one that this model does not take."""
        ids: list[int] = self.encode(prompt) if isinstance(prompt, str) else token_array(prompt).tolist()
        vocab = self.model.spec.vocab
        if max(ids) >= vocab:
            raise ConfigError(f"{name}: token id {max(ids)} is outside the vocabulary; accepted are 0 to {vocab - 1}")
        if len(ids) >= self.context:
            raise ConfigError(
                f"{name} has {len(ids)} tokens; with a context of {self.context} at most {self.context - 1} leave room to answer"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, begun as the model's own tokenizer begins it; an empty one is the document start alone."""
        tokenizer = self.model.text_tokenizer()
        ids = tokenizer.encode(text)
        start = tokenizer.start_id
        if start is not None and (not ids or (tokenizer.settings.get("add_bos_token") is True and ids[0] != start)):
            ids = [start, *ids]
        if not ids:
            raise ConfigError("the prompt is empty and this model has no document-start token; give at least one character")
        return ids

    def _detokenizer(self) -> Detokenizer | None:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return None
        return Detokenizer(tokenizer.decode, skipped_ids=tokenizer.special_ids, byte_ids=byte_token_ids(tokenizer.vocabulary))

    def _run(self, prepared: Sequence[Sequence[Request]]) -> Iterator[Chunk]:
        """Requests that one Program serves run together, beside those of other streams that are not at their end."""
        places = {outputs[0].index: place for place, outputs in enumerate(prepared)}
        for context in self._contexts:
            if together := [outputs for outputs in prepared if outputs[0].program_context == context]:
                for chunk in self._run_together(self.engine(context), together):
                    yield dataclasses.replace(chunk, index=places[chunk.index])

    def engine(self, context: int | None = None) -> Engine:
        """The engine of the Program for sequences of up to ``context`` tokens, of which LongRoPE models have two; the longest unless
        given. Made when it is first asked for."""
        context = self._contexts[-1] if context is None else context
        if context not in self._engines:
            cache_bytes = self.memory_plan(context).cache if self._cache_bytes is None else self._cache_bytes
            session = open_session(self.model, self.backend, context, self._formats, cache_bytes)
            self._engines[context] = Engine(
                session, self.scheduling, constraints=None if self.model.tokenizer is None else self._follow(),
                swap_bytes=self._swap_bytes, prefixes=self._prefixes,
            )  # fmt: skip
        return self._engines[context]

    def memory_plan(self, context: int | None = None) -> MemoryPlan:
        """What weights, cache and arena of `engine` take, which need not be there yet. Raises UserError where ``memory`` is not enough."""
        backend = find_loaded(self.backend, self.model)
        program = backend.program(self.model, self._contexts[-1] if context is None else context, self._formats)
        free = hardware.memory(hardware.ROOT).available or 8 << 30
        return plan_memory(
            program, backend.weight_bytes(program), slots=self.max_sequences, step_tokens=self.scheduling.step_tokens, memory=self._memory,
            free=free, outside=self._swap_bytes,
        )  # fmt: skip

    def _run_together(self, engine: Engine, prepared: Sequence[Sequence[Request]]) -> Iterator[Chunk]:
        mine, numbers, left = deque[Chunk](), list[int](), sum(map(len, prepared))
        self._news.update((outputs[0].index, mine) for outputs in prepared)
        try:
            for outputs in prepared:
                for job in self._jobs(outputs):
                    try:
                        numbers.append(self._submit(engine, job))
                    except NeverFitsError as error:
                        mine.extend(output.end("error", str(error)) for output in job)
            while left:
                while mine:
                    chunk = mine.popleft()
                    left -= chunk.finish_reason is not None
                    yield chunk
                for chunk in engine.step() if left else ():
                    self._news[chunk.index].append(chunk)
        finally:  # an abandoned stream ends here too
            for number in numbers:
                engine.abort(number)
            for outputs in prepared:
                del self._news[outputs[0].index]

    def _jobs(self, outputs: Sequence[Request]) -> list[Sequence[Request]]:
        """The outputs of one prompt, as many at a time as run together; those of a search are one job, whatever its width."""
        if outputs[0].params.beam is not None:
            return [outputs]
        slots = self.scheduling.batching.slots
        return [outputs[begin : begin + slots] for begin in range(0, len(outputs), slots)]

    def _submit(self, engine: Engine, outputs: Sequence[Request]) -> int:
        first = outputs[0]
        key = PrefixKey(self.model.name, None if self._formats is None else self._formats.cache)
        params, search = first.params, None
        states = [self._follow().start(params.grammar) for _ in (outputs if params.beam is None else outputs[:1])] if params.grammar else []
        if params.beam is not None:
            search = Search(params, params.beam, max_tokens=first.most, end_ids=first.end_ids, constraint=states[0] if states else None)
        else:
            for output, state in zip(outputs, states):
                output.constraint = state
        try:
            return engine.submit(outputs, key=key, search=search)
        except NeverFitsError:
            for state in states:
                state.close()
            raise


class _Answer:
    """One output, as its chunks come."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.text = ""
        self.token_ids: tuple[int, ...] = ()
        self.logprobs: tuple[TokenLogprob, ...] = ()
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    def take(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.error = chunk.finish_reason, chunk.error


def _as_chunk(index: int, one: Completion) -> Chunk:
    return Chunk(
        index, one.text, one.token_ids, one.finish_reason, one.choice, one.logprobs or (), one.prompt_logprobs, one.error
    )  # fmt: skip


def _returned(answers: Sequence[_Answer]) -> list[Completion]:
    """The outputs of one prompt that are returned, in the order of their choices."""
    params = answers[0].request.params
    chosen = list(range(len(answers)))
    if params.choices > params.n:
        chosen = best_choices([None if a.error else [entry.logprob for entry in a.logprobs] for a in answers], params.n)
    of_prompt = next((a.prompt_logprobs for a in answers if a.prompt_logprobs is not None), None)
    return [
        Completion(
            answers[one].request.prompt, answers[one].token_ids, answers[one].text, answers[one].finish_reason or "length", place,
            None if params.logprobs is None else answers[one].logprobs, of_prompt, answers[one].error,
        )
        for place, one in enumerate(chosen)
    ]  # fmt: skip


class Scorer(Protocol):
    """What scoring needs of a backend: logits of whole sequences, nothing carried on."""

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [R, vocab] of the batch's rows."""
        ...


def choose_backend(model: Model, backend: str = AUTO, formats: Formats | None = None) -> tuple[str, str]:
    """The backend to take, and what to tell the user about it ('' where there is nothing to tell).

    'auto' takes the native backend where it has every kernel, else the reference. Raises UnsupportedError for an unknown name, or for
    a weight format that would need the native backend where it cannot run."""
    if backend != AUTO:
        find_backend(backend)  # a wrong name is told at once, not with the first prompt
        return backend, ""
    missing = load_backend("cpu").refusals(model)
    if not missing:
        return "cpu", ""
    if formats is not None and formats.weights is not None:
        raise UnsupportedError(
            f"weights {formats.weights} pay on the native backend, which has no kernel for {', '.join(missing)} of {model.name}; "
            "--backend reference plays what they mean, no faster"
        )
    return "reference", f"{model.name} runs on the reference backend: no native kernel for {', '.join(missing)}"


def open_session(model: Model, backend: str, context: int, formats: Formats | None = None, cache_bytes: int | None = None) -> Session:
    """A session of the named backend, whose pages take ``cache_bytes``, as many as the backend thinks fit unless given. Raises
    MissingExtraError where the backend's library is not installed."""
    session: Session = _open(model, backend, context, formats, cache_bytes)
    return session


def open_scorer(model: Model, backend: str, context: int, formats: Formats | None = None) -> Scorer:
    """The same, for scoring."""
    scorer: Scorer = _open(model, backend, context, formats)
    return scorer


def _open(model: Model, backend: str, context: int, formats: Formats | None, cache_bytes: int | None = None) -> Any:
    return find_loaded(backend, model).session(model, context, formats, cache_bytes)


def find_loaded(backend: str, model: Model) -> Any:
    """The backend of that name, which ``model`` is to run on. Raises MissingExtraError where its library is not installed."""
    try:
        return load_backend(backend)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(f"{model.name}: backend {backend!r}", "torch") from None


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and all(isinstance(item, int | np.integer) for item in prompts)):
        return [prompts]  # type: ignore[list-item]
    wrong = [item for item in prompts if not isinstance(item, str | Sequence | np.ndarray)]
    if wrong:
        raise ConfigError(f"prompt {one_line(wrong[0])} is neither text nor a list of token ids")
    return list(prompts)  # type: ignore[arg-type]
