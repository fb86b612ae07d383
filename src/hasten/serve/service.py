"""The service: what every route needs of the engine, the tokenizer and the queue."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Protocol, TypeVar

from hasten.base.errors import UserError, one_line
from hasten.engine import SamplingParams
from hasten.serve.admission import Admission
from hasten.serve.counts import Counts, EndReason, Tally
from hasten.serve.errors import ApiError, refused, unready
from hasten.serve.log import Log, Note
from hasten.serve.mailbox import EngineGoneError, Mailbox
from hasten.serve.messages import Piece
from hasten.serve.recall import Recall, Recorded
from hasten.serve.supervisor import Supervisor
from hasten.serve.texts import Texts

MAX_OUTPUTS = 256
"""Of one request, where not even more are taken of all together."""
Encode = Callable[[], Awaitable[list[list[int]]]]


class Closable(Protocol):
    """Work in the engine's hands."""

    def close(self) -> None:
        """Abort what is not done."""
        ...


Job = TypeVar("Job", bound=Closable)


class Generation(Protocol):
    """The outputs of one HTTP request, of one or several prompts, whether they are computed or were kept."""

    prompts: list[list[int]]
    params: SamplingParams

    def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """News as they come, with the number of the choice: prompts in order, each with its outputs. Raises ApiError where one fails."""
        ...


class Computed:
    """Outputs that the engine computes. Read them to their end, or leave them: what is not done then is aborted."""

    def __init__(
        self, supervisor: Supervisor, prompts: list[list[int]], params: SamplingParams, tenant: str, note: Note, at_fault: str | None,
        counts: Counts,
    ) -> None:  # fmt: skip
        self.prompts, self.params, self._at_fault = prompts, params, at_fault
        self._supervisor, self._note, self._mailbox = supervisor, note, Mailbox[Piece]()
        self._tally = Tally(counts, note.began, list(map(len, prompts)), params.n)
        self._submitted = time.monotonic()
        self._cut: EndReason = "abort"
        self._left: dict[int, int] = {}  # outputs to come, by request
        self._place: dict[int, int] = {}
        note.prompt_tokens = sum(map(len, prompts))
        for place, prompt in enumerate(prompts):
            id = supervisor.submit(prompt, params, tenant, self._mailbox)
            self._left[id], self._place[id] = params.n, place

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """News as they come."""
        note, n, mailbox, tally = self._note, self.params.n, self._mailbox, self._tally
        while self._left:
            told: list[tuple[int, Piece]] = []
            try:
                pieces = await mailbox.take()
            except EngineGoneError:
                self._cut = "error"
                raise
            now = time.monotonic()
            for piece in pieces:
                if piece.error is not None:
                    self._cut = "error"
                    if piece.fault == "request":
                        raise ApiError(400, piece.error, param=self._at_fault, code="output_failed")
                    raise ApiError(500, piece.error, code="output_failed")
                output = self._place[piece.id] * n + piece.choice
                told.append((output, piece))
                note.output_tokens += len(piece.token_ids)
                tally.take(output, piece, self._submitted, mailbox.waited_s.get(piece.id, 0.0), now)
                if piece.finish_reason is not None:
                    self._left[piece.id] -= 1
                    if not self._left[piece.id]:
                        del self._left[piece.id]
                        self._supervisor.ended(piece.id)
            if note.first_token_s is None:
                note.first_token_s, note.queued_s = now - note.began, max(mailbox.waited_s.values(), default=0.0)
            yield told

    def close(self) -> None:
        """Abort what is not done."""
        self._tally.cut(sum(self._left.values()), self._cut)
        for id in self._left:
            self._supervisor.abort(id)
        self._left.clear()


class Service:
    """Serves the model called ``name``. ``deadline_s`` bounds every request; ``recall`` is the response cache, if there is one."""

    def __init__(
        self, name: str, supervisor: Supervisor, texts: Texts, admission: Admission, log: Log, *, deadline_s: float | None,
        counts: Counts | None = None, recall: Recall | None = None,
    ) -> None:  # fmt: skip
        self.name, self.supervisor, self.texts, self.admission, self.log = name, supervisor, texts, admission, log
        self.created = int(time.time())
        self.counts = Counts() if counts is None else counts
        self._deadline_s, self.recall = deadline_s, recall

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served."""
        if name is not None and name != self.name:
            message = f"the model {one_line(name)} is not served here; {self.name} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_open(self) -> None:
        """Raises ApiError 503 where nothing new is answered, for the server goes down."""
        if self.admission.draining:
            raise unready(5, "the server is going down")

    def check_able(self) -> None:
        """Raises ApiError 503 where no new work is taken."""
        self.check_open()
        self.check_engine()

    def check_engine(self) -> None:
        """Raises ApiError 503 where no engine answers."""
        if not self.supervisor.able:
            raise unready(
                self.supervisor.retry_s, f"the engine is {self.supervisor.state if self.supervisor.state != 'ready' else 'stuck'}"
            )

    @asynccontextmanager
    async def generation(
        self, encode: Encode, outputs: int, params: SamplingParams, tenant: str, note: Note, timeout_s: float | None,
        at_fault: str | None,
    ) -> AsyncIterator[Generation]:  # fmt: skip
        """The outputs that ``params`` ask for of each prompt that ``encode`` gives, ``outputs`` in all.

        ``at_fault`` is the field that the engine may yet refuse: a grammar is compiled there. Raises ApiError: 429 where too much waits
        already, before anything is encoded; 503 without an engine; 504 past the deadline. What the response cache holds is answered
        without an engine, and makes room for others as soon as it is found."""
        recall = self.recall if self.recall is not None and self.recall.serves(params) else None
        self.check_open()
        if recall is None:
            self.check_engine()
        async with self._placed(outputs, timeout_s) as leave:
            prompts = await encode()
            if recall is None:
                with closing(Computed(self.supervisor, prompts, params, tenant, note, at_fault, self.counts)) as computed:
                    yield computed
            elif (known := await recall.known(prompts, params, tenant, note)) is not None:
                leave()
                yield known
            else:
                self.check_engine()
                with closing(Computed(self.supervisor, prompts, params, tenant, note, at_fault, self.counts)) as computed:
                    recorded = Recorded(prompts, params, computed.pieces())
                    yield recorded
                recall.keep(recorded, tenant)

    @asynccontextmanager
    async def computed(
        self, encode: Encode, outputs: int, timeout_s: float | None, begin: Callable[[list[list[int]]], Job]
    ) -> AsyncIterator[Job]:  # fmt: skip
        """What ``begin`` makes of the prompts that ``encode`` gives; closed afterwards. Raises as `generation`."""
        self.check_able()
        async with self._placed(outputs, timeout_s):
            with closing(begin(await encode())) as job:
                yield job

    @asynccontextmanager
    async def _placed(self, outputs: int, timeout_s: float | None) -> AsyncIterator[Callable[[], None]]:
        """A place in the queue for so many outputs, until this is left or what it gives is called, and in time."""
        limits = [seconds for seconds in (timeout_s, self._deadline_s) if seconds is not None]
        with self._admitted(outputs) as leave:
            try:
                async with asyncio.timeout(min(limits) if limits else None):
                    with faults(self):
                        yield leave
            except TimeoutError:
                raise ApiError(504, f"not done within {min(limits):g} s; ask for less, or allow more time", code="timeout") from None

    @contextmanager
    def _admitted(self, outputs: int) -> Iterator[Callable[[], None]]:
        admission, most = self.admission, max(self.admission.most, MAX_OUTPUTS)
        if outputs > most:
            raise ApiError(400, f"{outputs} outputs in one request; at most {most} are taken; send several requests", param="n")
        if not admission.take(outputs):
            retry = admission.retry_s
            message = f"{admission.taken} outputs are on their way, {admission.most} at most are taken; try again in {retry} s"
            raise ApiError(429, message, code="overloaded", retry_s=retry)
        began = time.monotonic()
        left = False

        def leave() -> None:
            nonlocal left
            left = True
            admission.leave(outputs)

        try:
            yield leave
        finally:
            if not left:
                admission.give_back(outputs, time.monotonic() - began)


@contextmanager
def faults(service: Service) -> Iterator[None]:
    """What goes wrong inside, as what the client is told."""
    try:
        yield
    except EngineGoneError:
        why, retry = ("the server went down", 5) if service.admission.draining else ("the engine died", service.supervisor.retry_s)
        raise ApiError(503, f"{why} under this request; try again", code="engine_gone", retry_s=retry) from None
    except UserError as error:
        raise refused(error) from None
