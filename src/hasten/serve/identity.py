"""Identity: which model the engine plays, to the bit of its answers, and whether that is still so."""

import asyncio
from collections.abc import Callable

from hasten.base.errors import UserError, one_line
from hasten.checkpoint import load
from hasten.formats.weights import FileStamp
from hasten.model import Model
from hasten.program import Formats
from hasten.serve.messages import Begin, Ready
from hasten.serve.responses import Played, ResponseCache, digest_in_thread
from hasten.serve.supervisor import Supervisor

READY_CHECK_S = 0.1


class Identity:
    """Opens ``cache`` once it is known which model the engine of ``supervisor`` plays. Made before the first engine begins: files that are
    the same now and after an engine has read them are the ones it has read. ``told`` hears of it.

    An engine that takes the place of one that died is looked at anew; where it may play another model, the cache is closed for good, as
    the server's tokenizer is the former one's then."""

    def __init__(self, cache: ResponseCache, begin: Begin, supervisor: Supervisor, told: Callable[[str], None]) -> None:
        self._cache, self._begin, self._supervisor, self._told = cache, begin, supervisor, told
        self._model = load(begin.model)
        self._tokenizer = _stamp(self._model)
        self._known: Ready | None = None  # the engine that was looked at last
        self._task: asyncio.Task[None] | None = None
        self._lost = False

    @property
    def holds(self) -> bool:
        """Is the engine there is, or was last, known to play the model that the cache is open for?"""
        ready = self._supervisor.ready
        if ready is not None and ready is self._known:
            return self._cache.model is not None
        if ready is not None and self._task is None and not self._lost:
            self._task = asyncio.get_running_loop().create_task(self._look(ready))
        return False

    async def find(self) -> None:
        """Wait for the first engine, and look at it, rather than with the first request."""
        while not self.holds and not self._lost:
            await asyncio.sleep(READY_CHECK_S)

    def close(self) -> None:
        """Stop looking."""
        self._lost = True
        if self._task is not None:
            self._task.cancel()

    async def _look(self, ready: Ready) -> None:
        try:
            if self._cache.model is None:
                formats = Formats(self._begin.weights, self._begin.activations, self._begin.cache)
                found = await digest_in_thread(self._model, Played.here(ready.backend, formats, ready.context))
                await self._check()
                self._cache.open(found)
                self._told(f"the response cache is open, for model {found.hex()[:12]}")
            else:
                await self._check()
            self._known = ready
        except Exception as error:  # of files that change under the reader: the server needs none of this
            self._lost = True
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(str(error))}"
            self._told(f"the response cache is closed until the server starts again: {said}")
        finally:
            self._task = None

    async def _check(self) -> None:
        """Raise UserError where what is read now is not what was read first."""
        now, first = await asyncio.to_thread(load, self._begin.model), self._model
        if (
            (now.spec, now.source, now.generation, now.weights.origin) != (first.spec, first.source, first.generation, first.weights.origin)
            or (now.tokenizer and now.tokenizer.settings) != (first.tokenizer and first.tokenizer.settings)
            or _stamp(now) != self._tokenizer
        ):
            raise UserError(f"the files of {self._begin.model} were changed meanwhile")


def _stamp(model: Model) -> FileStamp | None:
    """Of the tokenizer's file."""
    if model.tokenizer is None:
        return None
    try:
        return FileStamp.of(model.tokenizer.path, model.tokenizer.path.stat())
    except OSError:
        return None
