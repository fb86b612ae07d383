"""Streams: several readers of one engine, each of which gets its own requests' chunks."""

from collections import deque
from collections.abc import Iterator, Sequence

from hasten.engine.engine import Engine
from hasten.engine.plan import NeverFitsError
from hasten.engine.prepare import Prepared
from hasten.engine.request import Chunk


class Streams:
    """Who reads steps the engine, for all; streams may be read by turns, in one thread."""

    def __init__(self) -> None:
        self._news: dict[int, deque[Chunk]] = {}  # by request: where its stream takes its chunks from

    def run(self, engine: Engine, requests: Sequence[Prepared]) -> Iterator[Chunk]:
        """Chunks of these requests as they are made; a stream that is closed ends those of them that are not at their end."""
        mine, numbers, left = deque[Chunk](), list[int](), sum(len(one.outputs) for one in requests)
        self._news.update((one.index, mine) for one in requests)
        try:
            for one in requests:
                try:
                    numbers += one.submit(engine)
                except NeverFitsError as error:
                    mine.extend(one.refused(str(error)))
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
            for one in requests:
                del self._news[one.index]
