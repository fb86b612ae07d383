"""What the service does around a known answer: the queue, an engine that is down, outputs that fail."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from hasten.engine import SamplingParams
from hasten.serve.admission import Admission
from hasten.serve.errors import ApiError
from hasten.serve.log import Note
from hasten.serve.messages import Piece
from hasten.serve.recall import MOST_WRITES, Recall
from hasten.serve.responses import Limits, MemoryStore, Output, ResponseCache
from hasten.serve.service import Service

GREEDY = SamplingParams(max_tokens=2, n=2)


class Engine:
    """In the supervisor's place: ends each output with two pieces, or as ``fails`` says."""

    def __init__(self) -> None:
        self.able, self.state, self.retry_s = True, "ready", 3
        self.fails: dict[int, Piece] = {}
        self.submitted = self.ended_ = 0
        self.aborted: list[int] = []

    def submit(self, prompt, params, tenant, mailbox) -> int:
        self.submitted += 1
        id = self.submitted
        for choice in range(params.n):
            mailbox.put(Piece(id, choice, "a", (prompt[0],), None))
        for choice in range(params.n):
            mailbox.put(self.fails.get(choice) or Piece(id, choice, str(choice), (choice,), "length"))
        return id

    def ended(self, id: int) -> None:
        self.ended_ += 1

    def abort(self, id: int) -> None:
        self.aborted.append(id)


class Store(MemoryStore):
    """Can be held up, and can break."""

    def __init__(self) -> None:
        super().__init__(Limits())
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = False

    async def put(self, key: bytes, value: bytes) -> bool:
        await self.gate.wait()
        if self.broken:
            raise RuntimeError("broken")
        return await super().put(key, value)


class Place:
    """A service over one `Engine`; ``said`` is what its log was told."""

    def __init__(self) -> None:
        self.engine, self.store, self.admission = Engine(), Store(), Admission(4, 2)
        self.said: list[str] = []
        cache = ResponseCache(self.store, 1 << 20)
        cache.open(b"model")
        log = SimpleNamespace(event=self.said.append)
        self.recall = Recall(cache, SimpleNamespace(holds=True, close=lambda: None), log)
        self.service = Service("m", self.engine, None, self.admission, log, deadline_s=None, recall=self.recall)

    async def ask(self, prompts=((5,),), params: SamplingParams = GREEDY, tenant: str = "") -> tuple[Note, list, int]:
        """The note, all pieces without whose they are, and how many places were taken while they were sent."""
        note = Note("1", "POST", "/", time.monotonic())

        async def encode() -> list[list[int]]:
            return [list(prompt) for prompt in prompts]

        told, taken = [], 0
        async with self.service.generation(encode, len(prompts) * params.n, params, tenant, note, None, None) as generation:
            async for news in generation.pieces():
                taken = max(taken, self.admission.taken)
                told += [(place, piece.text, piece.token_ids, piece.finish_reason) for place, piece in news]
        await asyncio.sleep(0)
        return note, told, taken


WHOLE = [(0, "a0", (5, 0), "length"), (1, "a1", (5, 1), "length")]


def test_a_known_answer_gives_its_place_up_and_needs_no_engine():
    async def go() -> None:
        place = Place()
        note, told, taken = await place.ask()
        assert (note.cached, taken, len(told)) == ("", 2, 4)
        seconds = place.admission.seconds
        place.engine.able, place.engine.state = False, "down"
        note, told, taken = await place.ask()
        assert (note.cached, taken, told) == ("exact", 0, WHOLE)
        assert (note.prompt_tokens, note.output_tokens) == (1, 4)
        assert note.first_token_s is not None
        assert place.admission.seconds == seconds  # what clients are told to wait is about what is computed
        for asked in ({"prompts": ((6,),)}, {"tenant": "other"}, {"params": SamplingParams(max_tokens=2, n=2, temperature=1.0)}):
            with pytest.raises(ApiError) as refused:
                await place.ask(**asked)
            assert (refused.value.status, refused.value.retry_s) == (503, 3)
        assert place.engine.submitted == 1
        assert place.admission.taken == 0
        place.admission.draining = True
        with pytest.raises(ApiError, match="going down"):
            await place.ask()
        place.admission.draining = False
        place.admission.taken = 3
        with pytest.raises(ApiError) as refused:
            await place.ask()
        assert refused.value.status == 429
        counts = place.recall.cache.counts()
        assert (counts["hits"], counts["misses"]) == (1, 3)

    asyncio.run(go())


def test_all_prompts_are_known_or_all_are_computed():
    async def go() -> None:
        place = Place()
        await place.ask(((5,),))
        note, told, _ = await place.ask(((5,), (6,)))
        assert (note.cached, len(told), place.engine.submitted) == ("", 8, 3)
        note, told, _ = await place.ask(((6,), (5,)))
        assert note.cached == "exact"
        assert [(index, text, ids[0]) for index, text, ids, _ in told] == [(0, "a0", 6), (1, "a1", 6), (2, "a0", 5), (3, "a1", 5)]
        assert place.engine.submitted == 3

    asyncio.run(go())


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("fault", ["request", "engine"])
def test_what_fails_is_not_kept(choice, fault):
    async def go() -> None:
        place = Place()
        place.engine.fails[choice] = Piece(1, choice, "", (), "error", "it failed", fault)
        with pytest.raises(ApiError, match="it failed"):
            await place.ask()
        place.engine.fails.clear()
        assert (await place.ask())[0].cached == ""
        assert (await place.ask())[0].cached == "exact"

    asyncio.run(go())


@pytest.mark.parametrize("leaves", ["break", "raise"])
def test_who_leaves_before_the_end_leaves_nothing(leaves):
    async def go() -> None:
        place = Place()
        note = Note("1", "POST", "/", time.monotonic())

        async def encode() -> list[list[int]]:
            return [[5]]

        place.engine.fails[1] = Piece(1, 1, "b", (1,), None)  # never ends
        with pytest.raises(ValueError) if leaves == "raise" else pytest.MonkeyPatch.context():
            async with place.service.generation(encode, 2, GREEDY, "", note, None, None) as generation:
                async for _ in generation.pieces():
                    if leaves == "break":
                        break
                    raise ValueError
        assert place.engine.aborted == [1]
        assert place.admission.taken == 0
        assert not place.store.counts()["entries"]
        place.engine.fails.clear()
        assert (await place.ask())[0].cached == ""

    asyncio.run(go())


def test_a_store_that_holds_up_or_breaks_costs_no_request():
    async def go() -> None:
        place = Place()
        place.store.gate.clear()
        for token in range(MOST_WRITES + 40):
            assert len((await asyncio.wait_for(place.ask(((token,),)), 1))[1]) == 4
        place.store.gate.set()
        await asyncio.sleep(0.05)
        assert place.store.counts()["entries"] == MOST_WRITES  # the rest was not kept, rather than held in memory
        place.store.broken = True
        await place.ask(((999,),))
        await asyncio.sleep(0.01)
        assert place.said == ["an answer was not kept: RuntimeError: 'broken'"]
        place.store.gate.clear()
        closing = asyncio.create_task(place.recall.close())
        place.store.gate.set()
        await asyncio.wait_for(closing, 1)

    asyncio.run(go())


def test_all_that_a_piece_says_is_kept():
    """A field that pieces gain must be kept, or a hit is less than what was computed."""
    assert set(Piece.__struct_fields__) - {"id", "choice", "error", "fault"} == set(Output.__struct_fields__)
