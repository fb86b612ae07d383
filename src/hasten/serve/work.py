"""Work: the requests that the engine's process has in hand, under the server's numbers."""

import re
import traceback
from collections.abc import Iterable

from hasten.base.errors import UserError, one_line
from hasten.engine import LLM, Chunk
from hasten.engine.answer import Answer
from hasten.engine.engine import Engine
from hasten.serve.messages import Fault, Piece, Stats, Submit
from hasten.serve.meter import Meter

_INSIDE = re.compile(r"\w+(Error|Exception): ")
"""How the engine words what failed in computing; what a grammar failed at is worded for its writer."""


class _Live:
    """One request on its way."""

    def __init__(self, id: int, engine: Engine, numbers: list[int], answer: Answer, grammatical: bool) -> None:
        self.id, self.engine, self.numbers, self.answer, self.grammatical = id, engine, numbers, answer, grammatical


class Work:
    """Runs requests over the engines of ``llm``, one step of each at a time. What fails is one request's, never the loop's."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._meters: dict[Engine, Meter] = {}
        self._ids: dict[tuple[Engine, int], int] = {}  # the server's number, by the engine's
        self._begun: list[tuple[int, float]] = []
        self._live: dict[int, _Live] = {}  # by the server's number
        self._by_index: dict[int, _Live] = {}  # by the number that chunks bear
        self._index: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Is there anything to compute?"""
        return bool(self._live)

    def submit(self, submit: Submit) -> list[Piece]:
        """Take a request; what is to be said of it at once, which is nothing unless it is refused."""
        try:
            prepared = self._llm.preparer.prepare(submit.prompt, submit.params, tenant=submit.tenant)
            engine = self._llm.engine(prepared.context)
            if engine not in self._meters:
                self._meters[engine] = Meter(engine)
            live = _Live(submit.id, engine, [], prepared.answer(), submit.params.grammar is not None)
            live.numbers += prepared.submit(engine)
        except UserError as error:
            return [_ended(submit.id, choice, str(error), "request") for choice in range(submit.params.n)]
        except Exception as error:
            traceback.print_exc()
            return [_ended(submit.id, choice, _said(error), "engine") for choice in range(submit.params.n)]
        self._live[submit.id] = self._by_index[prepared.index] = live
        self._index[submit.id] = prepared.index
        self._ids.update(((engine, number), submit.id) for number in live.numbers)
        return []

    def abort(self, id: int) -> None:
        """End a request wherever it is; an unknown one has ended already."""
        if (live := self._live.get(id)) is not None:
            for number in live.numbers:
                live.engine.abort(number)
            self._forget(live)

    def step(self) -> list[Piece]:
        """Compute one step of each engine that has work; what became known."""
        pieces: list[Piece] = []
        for engine, meter in self._meters.items():
            if engine.busy:
                chunks = meter.step()
                for number, waited_s in engine.scheduler.let_in:
                    if (id := self._ids.get((engine, number))) is not None:
                        self._begun.append((id, waited_s))
                pieces += self._told(chunks)
        return pieces

    def take_begun(self) -> list[tuple[int, float]]:
        """The requests that have joined the batch since this was last asked, and how many seconds each had waited."""
        begun, self._begun = self._begun, []
        return begun

    def stats(self) -> Stats:
        """How things stand, all engines together."""
        counters: dict[str, int] = {}
        usage = 0.0
        for engine, meter in self._meters.items():
            for name, value in meter.counters().items():
                counters[name] = counters.get(name, 0) + value
            usage = max([usage, *(1 - pool.available / pool.pages for pool in engine.cache.pools if pool.pages)])
        return Stats(
            running=sum(engine.scheduler.running for engine in self._meters),
            waiting=sum(engine.scheduler.waiting for engine in self._meters),
            cache_usage=usage,
            counters=counters,
        )

    def _told(self, chunks: Iterable[Chunk]) -> list[Piece]:
        pieces = []
        for chunk in chunks:
            if (live := self._by_index.get(chunk.index)) is None:
                continue
            try:
                pieces += [_piece(live, one) for one in live.answer.take(chunk)]
            except Exception as error:  # ends the request, which one piece is enough to tell
                traceback.print_exc()
                pieces.append(_ended(live.id, chunk.choice, _said(error), "engine"))
                self.abort(live.id)
                continue
            if live.answer.done:
                self._forget(live)
        return pieces

    def _forget(self, live: _Live) -> None:
        del self._live[live.id], self._by_index[self._index.pop(live.id)]
        for number in live.numbers:
            del self._ids[live.engine, number]


def _piece(live: _Live, one: Chunk) -> Piece:
    fault: Fault = "" if one.error is None else "request" if live.grammatical and not _INSIDE.match(one.error) else "engine"
    return Piece(
        live.id, one.choice, one.text, one.token_ids, one.finish_reason, one.error, fault, one.logprobs, one.prompt_logprobs, one.stop
    )  # fmt: skip


def _ended(id: int, choice: int, error: str, fault: Fault) -> Piece:
    return Piece(id, choice, "", (), "error", error, fault)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(str(error), 300)}"
