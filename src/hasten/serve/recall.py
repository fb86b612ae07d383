"""Recall: requests that must give the same answer get the one that was kept, and what is computed for them is kept."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from hasten.base.errors import one_line
from hasten.engine import SamplingParams, TokenLogprob
from hasten.engine.request import FinishReason
from hasten.serve.identity import Identity
from hasten.serve.log import Log, Note
from hasten.serve.messages import Piece
from hasten.serve.responses import Answer, Asked, Hit, Output, ResponseCache, SemanticCache, must_repeat

MOST_WRITES = 256
"""Answers on their way into the cache; what is computed while so many are is not kept."""

CLOSES_WITHIN_S = 1.0
NONE_YET = {"hits": 0, "misses": 0}


class Known:
    """The outputs of one HTTP request whose answers were kept: one piece each."""

    def __init__(self, prompts: list[list[int]], params: SamplingParams, hits: Sequence[Hit], note: Note) -> None:
        self.prompts, self.params, self._hits, self._note = prompts, params, hits, note
        note.prompt_tokens = sum(map(len, prompts))
        note.cached = next((hit.header for hit in hits if hit.kind != "exact"), hits[0].header)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """All of them, at once."""
        outputs = [output for hit in self._hits for output in hit.answer.outputs]
        self._note.output_tokens = sum(len(output.token_ids) for output in outputs)
        self._note.first_token_s = time.monotonic() - self._note.began
        yield [(place, _piece(place, output)) for place, output in enumerate(outputs)]


class Recorded:
    """The outputs of one HTTP request as they are computed (``pieces``), kept in mind. `answers` are there once all have ended well."""

    def __init__(self, prompts: list[list[int]], params: SamplingParams, pieces: AsyncIterator[list[tuple[int, Piece]]]) -> None:
        self.prompts, self.params, self._pieces = prompts, params, pieces
        self._told: list[tuple[int, Piece]] = []
        self._whole = False

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """As they come."""
        async for told in self._pieces:
            self._told += told
            yield told
        self._whole = True  # an output that fails, and a client that goes, end this otherwise

    def answers(self) -> list[Answer] | None:
        """Of each prompt; None where one is not whole."""
        n = self.params.n
        outputs = [_Pieces() for _ in range(len(self.prompts) * n)]
        for place, piece in self._told:
            outputs[place].take(piece)
        ended = [made for one in outputs if (made := one.output(self.params.logprobs is not None)) is not None]
        if not self._whole or len(ended) < len(outputs):
            return None
        return [
            Answer(of_it := tuple(ended[i * n : (i + 1) * n]), len(prompt), sum(len(output.token_ids) for output in of_it))
            for i, prompt in enumerate(self.prompts)
        ]


class Recall:
    """The response cache as the service uses it; ``log`` hears of what goes wrong with it, which no request does. ``near`` makes the
    semantic cache of the model of that digest, for those who asked for one."""

    def __init__(
        self, cache: ResponseCache, identity: Identity, log: Log, near: Callable[[bytes], SemanticCache] | None = None
    ) -> None:  # fmt: skip
        self.cache, self._identity, self._log = cache, identity, log
        self._make_near = near
        self._near: SemanticCache | None = None
        self._writes: set[asyncio.Task[None]] = set()

    def counts(self) -> dict[str, Callable[[], Mapping[str, int]]]:
        """By kind of hit, what counts its ``hits`` and ``misses``."""
        exact: dict[str, Callable[[], Mapping[str, int]]] = {"exact": self.cache.counts}
        if self._make_near is not None:
            exact["semantic"] = lambda: NONE_YET if self._near is None else self._near.counts()
        return exact

    def serves(self, params: SamplingParams) -> bool:
        """May a request like this be answered so, now?"""
        return must_repeat(params) and self._identity.holds

    async def known(self, prompts: list[list[int]], params: SamplingParams, tenant: str, note: Note) -> Known | None:
        """The whole answer, if it is there for every prompt."""
        asked = [Asked(tenant, tuple(prompt), params) for prompt in prompts]
        found = [await self._hit(asked[0])]
        if found[0] is not None and len(asked) > 1:
            found += await asyncio.gather(*map(self._hit, asked[1:]))
        hits = [hit for hit in found if hit is not None and len(hit.answer.outputs) == params.n]
        if len(hits) < len(prompts):
            return None
        return Known(prompts, params, hits, note)

    def keep(self, recorded: Recorded, tenant: str) -> None:
        """Keep what came of a request, if all of it did. Nobody waits for that."""
        if len(self._writes) < MOST_WRITES and self.serves(recorded.params) and (answers := recorded.answers()) is not None:
            task = asyncio.get_running_loop().create_task(self._write(recorded, answers, tenant))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Write what is being written, if that is soon done, and let go of the store."""
        self._identity.close()
        if self._writes:
            _, late = await asyncio.wait(self._writes, timeout=CLOSES_WITHIN_S)
            for task in late:
                task.cancel()
        await self.cache.close()

    async def _hit(self, asked: Asked) -> Hit | None:
        if (found := await self.cache.get(asked)) is not None or (near := self._nearby()) is None:
            return found
        return await near.get(asked)

    def _nearby(self) -> SemanticCache | None:
        if self._near is None and self._make_near is not None and self.cache.model is not None:
            self._near = self._make_near(self.cache.model)
        return self._near

    async def _write(self, recorded: Recorded, answers: Sequence[Answer], tenant: str) -> None:
        try:
            for prompt, answer in zip(recorded.prompts, answers, strict=True):
                asked = Asked(tenant, tuple(prompt), recorded.params)
                await self.cache.put(asked, answer)
                if (near := self._nearby()) is not None:
                    await near.put(asked, answer)
        except Exception as error:  # of a store: the request was answered
            self._log.event(f"an answer was not kept: {type(error).__name__}: {one_line(str(error))}")


class _Pieces:
    """One output, as its news come."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self._finish_reason: FinishReason | None = None
        self._stop: str | None = None

    def take(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs = piece.prompt_logprobs
        self._finish_reason, self._stop = piece.finish_reason, piece.stop

    def output(self, with_logprobs: bool) -> Output | None:
        """As it is kept; None for one that has not ended by itself."""
        if self._finish_reason is None or self._finish_reason == "error":
            return None
        logprobs = tuple(self._logprobs) if with_logprobs else None
        return Output("".join(self._texts), tuple(self._token_ids), self._finish_reason, logprobs, self._prompt_logprobs, self._stop)


def _piece(place: int, output: Output) -> Piece:
    return Piece(
        0, place, output.text, output.token_ids, output.finish_reason, None, "", output.logprobs or (), output.prompt_logprobs, output.stop
    )  # fmt: skip
