"""LLM: a model and a backend, ready to complete prompts, many at a time."""

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import ConfigError, MissingExtraError, UnsupportedError, UserError, one_line
from hasten.checkpoint import load
from hasten.engine.beam_decode import beam_decode
from hasten.engine.choices import best_choices
from hasten.engine.constraint import Constraints
from hasten.engine.detokenize import Detokenizer, byte_token_ids
from hasten.engine.draw import TokenLogprob
from hasten.engine.request import Chunk, FinishReason, Request
from hasten.engine.sampling import SamplingParams, check_ids
from hasten.formats.cache import cache_format
from hasten.model import Model, find_backend, load_backend
from hasten.program import Batch, Formats, lowering_contexts, token_array

if TYPE_CHECKING:
    from hasten import _native

Prompt = str | Sequence[int]

AUTO = "auto"
"""The backend that is best for a model on this machine."""


class Session(Protocol):
    """What the engine needs of a backend: a state for new sequences, and a step that takes and returns one.

    The state is the backend's own; it can ``select`` sequences and be ``joined`` with another."""

    @property
    def threads(self) -> "_native.ThreadPool | None":
        """Threads that sampling may share between steps; None where there are none of its own."""
        ...

    def start(self, sequences: int) -> Any:
        """The state of sequences that have seen nothing."""
        ...

    def step(self, batch: Batch, state: Any) -> tuple[NDArray[np.float32], Any]:
        """Logits [R, vocab] of the batch's rows, and the state afterwards."""
        ...


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

    At most ``max_sequences`` run together; the next prompt joins as soon as one ends. ``context`` bounds prompt and output (the model's
    own unless given). ``backend`` is chosen for the model unless given, and ``notice`` says what a user should know of the choice;
    ``formats`` is how linear layers are stored and fed, and what the cache holds; the backend's own unless given."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        backend: str = AUTO,
        formats: Formats | None = None,
        context: int | None = None,
        max_sequences: int = 16,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(model)
        longest = self.model.spec.context
        self.context = longest if context is None else context
        if not 1 < self.context <= longest:
            raise ConfigError(f"context {self.context} is out of range; {self.model.name} accepts 2 to {longest}")
        if max_sequences < 1:
            raise ConfigError(f"max_sequences is {max_sequences}; at least 1 is needed")
        self.max_sequences = max_sequences
        self.backend, self.notice = choose_backend(self.model, backend, formats)
        self._formats = formats
        if formats is not None and formats.cache is not None:
            cache_format(formats.cache)  # a wrong name is told at once, not with the first prompt
        self._contexts = lowering_contexts(self.model.spec, self.context)
        self._sessions: dict[int, Session] = {}
        self._constraints: Constraints | None = None

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """One Completion per output, in the order of prompts and then of choices (one, unless ``n`` asks for more).

        A prompt is text or token ids; ``params`` is one for all or one per prompt. What fails one output is its ``error``."""
        requests = self._requests(prompts, params)
        answers = {request.key: _Answer(request) for request in requests}
        for chunk in self._run(requests):
            answers[chunk.index, chunk.choice].take(chunk)
        each: dict[int, list[_Answer]] = {}
        for answer in answers.values():
            each.setdefault(answer.request.index, []).append(answer)
        return [one for answers in each.values() for one in _returned(answers)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Chunk]:
        """Chunks as they are made; ``index`` and ``choice`` say whose. Every output's last chunk has a finish_reason.

        Outputs that must be compared before any is returned (``best_of``, beam search) come whole, one chunk each."""
        requests = self._requests(prompts, params)
        compared: dict[int, list[_Answer]] = {}
        for request in requests:
            if request.params.choices > request.params.n:
                compared.setdefault(request.index, []).append(_Answer(request))
        for chunk in self._run(requests):
            if chunk.index not in compared:
                yield chunk
                continue
            answers = compared[chunk.index]
            answers[chunk.choice].take(chunk)
            if all(answer.finish_reason is not None for answer in answers):
                yield from (_as_chunk(chunk.index, one) for one in _returned(answers))

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[Request]:
        many = _as_prompts(prompts)
        each = [params or SamplingParams()] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ConfigError(f"{len(each)} SamplingParams for {len(many)} prompts; give one, or one per prompt")
        return [request for index, (prompt, p) in enumerate(zip(many, each)) for request in self._choices(index, prompt, p)]

    def _choices(self, index: int, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """The outputs to draw of one prompt; those of a beam search from one request."""
        ids = self.encode(prompt) if isinstance(prompt, str) else token_array(prompt).tolist()
        vocab = self.model.spec.vocab
        if max(ids) >= vocab:
            raise ConfigError(f"prompt {index}: token id {max(ids)} is outside the vocabulary; accepted are 0 to {vocab - 1}")
        check_ids(params, vocab)
        if len(ids) >= self.context:
            raise ConfigError(
                f"prompt {index} has {len(ids)} tokens; with a context of {self.context} at most {self.context - 1} leave room to answer"
            )
        if params.stop or params.grammar is not None or params.echo:
            self.model.text_tokenizer()  # these need text
        if params.beam is not None and params.grammar is not None and not self.model.eos_token_ids:
            raise ConfigError(
                f"beam search with a grammar needs an end of text, which {self.model.name} has none of; leave one of them out"
            )
        needed = min(len(ids) + params.max_tokens, self.context)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return [
            Request(
                index, ids, params, limit=self.context, end_ids=frozenset(self.model.eos_token_ids), detokenizer=self._detokenizer(),
                program_context=next(context for context in self._contexts if needed <= context), choice=choice, seed=seed,
                constraint=None if params.grammar is None or params.beam is not None else self._follow().start(params.grammar),
            )
            for choice in range(params.choices)
        ]  # fmt: skip

    def _follow(self) -> Constraints:
        """What follows grammars for this model."""
        if self._constraints is None:
            self._constraints = Constraints(self.model.text_tokenizer().path, self.model.spec.vocab, self.model.eos_token_ids)
        return self._constraints

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

    def _run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Requests that one Program serves run together; beam searches one after another."""
        try:
            for context in self._contexts:
                served = [request for request in requests if request.program_context == context]
                if together := [request for request in served if request.params.beam is None]:
                    yield from self._run_together(self._session(context), together)
                for request in served:
                    if request.params.beam is not None and request.choice == 0:
                        yield from self._search(self._session(context), request)
        finally:
            for request in requests:
                if request.constraint is not None:
                    request.constraint.close()  # an abandoned stream ends here too

    def _search(self, session: Session, request: Request) -> Iterator[Chunk]:
        """One chunk for each output that a beam search found; those it did not find are errors."""
        search, error = request.params.beam, "the search found fewer outputs"
        found = []
        if search is not None:
            try:
                found = beam_decode(
                    session, request.prompt, request.params, search, max_tokens=request.most, end_ids=request.end_ids,
                    constraints=None if request.params.grammar is None else self._follow(),
                )  # fmt: skip
            except UserError as failure:
                error = str(failure)
        for choice in range(request.params.n):
            if choice < len(found):
                text = request.text_of(found[choice].tokens)
                yield Chunk(request.index, text, found[choice].tokens, "stop" if found[choice].ended else "length", choice)
            else:
                yield Chunk(request.index, "", (), "error", choice, error=error)

    def _session(self, context: int) -> Session:
        if context not in self._sessions:
            self._sessions[context] = open_session(self.model, self.backend, context, self._formats)
        return self._sessions[context]

    def _run_together(self, session: Session, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Every running request catches its computed tokens up to its known ones, one step after another."""
        from hasten.engine.sampler import Sampler  # late: it needs the native code, which importing the engine does not

        waiting, running = list(requests), list[Request]()
        sampler = Sampler(session.threads)
        state = session.start(0)
        while waiting or running:
            chunks = [ended for request in running + waiting if (ended := _ended_by_grammar(request)) is not None]
            waiting = [request for request in waiting if request.finish_reason is None]
            ready = [request for request in waiting if request.constraint is None or request.constraint.ready]
            joining = ready[: self.max_sequences - len(running)]
            waiting, running = [request for request in waiting if request not in joining], running + joining
            if joining:
                state = state.joined(session.start(len(joining)))
            running, state = _staying(running, state)
            if running:
                batch, last = _next_batch(running)
                logits, state = session.step(batch, state)
                for request, draw in zip(running, sampler.draw(logits[last], running), strict=True):
                    if request.computed == 0 and request.params.prompt_logprobs is not None and request.choice == 0:
                        rows = slice(last[running.index(request)] - len(request.prompt) + 1, last[running.index(request)])
                        request.prompt_logprobs = tuple(sampler.score(logits[rows], request.prompt[1:], request.params.prompt_logprobs))
                    request.computed += len(request.pending)
                    failed = draw.error is not None
                    chunks.append(request.end("error", draw.error) if failed else request.take(draw.token, draw.logprob))
                running, state = _staying(running, state)
            yield from chunks
            if self._constraints is not None:
                followed = [r.constraint for r in (running or waiting) if r.constraint is not None]
                self._constraints.wait(MASK_SECONDS, followed)


MASK_SECONDS = 10.0
"""Longest wait for what the grammars of a step allow; the constraints' own limits come first."""


def _ended_by_grammar(request: Request) -> Chunk | None:
    """The last chunk of a request whose grammar is complete or has failed."""
    constraint = request.constraint
    if constraint is None or request.finish_reason is not None or not constraint.ready:
        return None
    if constraint.error is not None:
        return request.end("error", constraint.error)
    return request.end("stop") if constraint.complete else None


def _staying(running: list[Request], state: Any) -> tuple[list[Request], Any]:
    """The requests that have not ended, and their state."""
    staying = [index for index, request in enumerate(running) if request.finish_reason is None]
    return (running, state) if len(staying) == len(running) else ([running[index] for index in staying], state.select(staying))


def _next_batch(running: Sequence[Request]) -> tuple[Batch, list[int]]:
    """What every request has pending, with all of its rows where prompt log-probabilities are due, and which logit row is each's last."""
    batch = Batch.of([request.pending for request in running], [request.computed for request in running], rows="last")
    rows: list[int] = []
    last: list[int] = []
    for place, request in enumerate(running):
        due = request.computed == 0 and request.params.prompt_logprobs is not None and request.choice == 0
        end = int(batch.offsets[place + 1])
        rows += range(int(batch.offsets[place]), end) if due else [end - 1]
        last.append(len(rows) - 1)
    return dataclasses.replace(batch, rows=np.array(rows, np.int32)), last


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


def open_session(model: Model, backend: str, context: int, formats: Formats | None = None) -> Session:
    """A session of the named backend. Raises MissingExtraError where the backend's library is not installed."""
    session: Session = _open(model, backend, context, formats)
    return session


def open_scorer(model: Model, backend: str, context: int, formats: Formats | None = None) -> Scorer:
    """The same, for scoring."""
    scorer: Scorer = _open(model, backend, context, formats)
    return scorer


def _open(model: Model, backend: str, context: int, formats: Formats | None) -> Any:
    try:
        return load_backend(backend).session(model, context, formats)
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
