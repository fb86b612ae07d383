"""Drawing: from logits to how each sequence goes on, into outputs that are drawn or into the beams of a search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from hasten.base.errors import UserError
from hasten.engine.draw import Draw
from hasten.engine.forward import Rows
from hasten.engine.live import Live, Step
from hasten.engine.request import Chunk, Request
from hasten.engine.search import Search
from hasten.program import Logits

if TYPE_CHECKING:
    from hasten.engine.sampler import Due, Sampling

Asked = tuple[int, int, int]
"""A drawing sequence, the sequence that the token is for, and the row of the logits."""


class AnySampler(Protocol):
    """The engine's own, or one that draws where the logits lie."""

    def begin(self, logits: Logits, rows: Sequence[int], sequences: Sequence[Request]) -> "Sampling":
        """Begin to draw for ``sequences`` from their ``rows`` of ``logits``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A step's ``rows``, and the tokens that are ``asked`` of them; ``sampling`` draws those, None where it could not begin."""

    rows: Rows
    asked: Sequence[Asked]
    sampling: "Sampling | None"


def begin(sampler: AnySampler, live: Live, rows: Rows) -> Drawing:
    """Begin to draw: at the end of a prompt for all outputs of its request, else for the sequence itself. Searches are not drawn for."""
    asked: list[Asked] = []
    for sequence, row in rows.at:
        if (request := live.requests.get(sequence)) is None or (live.searches and _searches(live, sequence)):
            continue
        begins = sequence in live.sequences and not request.output
        asked += [(sequence, each, row) for each in (live.sequences[sequence] if begins else [sequence])]
    try:
        sampling = sampler.begin(rows.logits, [row for _, _, row in asked], [live.requests[each] for _, each, _ in asked])
    except Exception:  # whose fault it is, each alone will tell
        sampling = None
    return Drawing(rows, asked, sampling)


def due(live: Live, drawing: Drawing) -> "Due | None":
    """The tokens, where each sequence goes on by one that comes by itself, and nothing that the host follows hangs on it."""
    tokens = None if drawing.sampling is None else drawing.sampling.due
    if tokens is None or any(_searches(live, sequence) for sequence, _ in drawing.rows.at):
        return None
    for sequence, each, _ in drawing.asked:
        if sequence != each or ((request := live.requests.get(each)) is not None and request.constraint is not None):
            return None
    return tokens


def awaited(drawing: Drawing) -> dict[int, list[tuple[int, int]]]:
    """How each sequence goes on by a token that is due: −2 − i stands for what row i of the draw gives."""
    return {sequence: [(sequence, -2 - place)] for place, (sequence, _, _) in enumerate(drawing.asked)}


def draw(sampler: AnySampler, live: Live, drawing: Drawing, step: Step) -> dict[int, list[tuple[int, int]]]:
    """How each sequence goes on: at the end of its prompt, into all outputs of its request; in a search, into the beams that continue
    it."""
    rows, asked = drawing.rows, drawing.asked
    draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence, _ in rows.at}
    for (sequence, each, _), drawn in zip(asked, _drawn(sampler, live, drawing) if asked else (), strict=True):
        if (request := live.requests.get(each)) is None:
            continue  # what was due when this was begun has ended it
        if drawn.error is not None:
            why = request.constraint.error if request.constraint is not None else None
            step.chunks.append(request.end("error", why or drawn.error))
            live.forget(each)
            continue
        draws[sequence].append((each, drawn.token))
        if drawn.logprob is not None:
            step.logprobs[each] = drawn.logprob
    searching: dict[int, dict[int, int]] = {}
    for sequence, row in rows.at if live.searches else ():
        if _searches(live, sequence):
            searching.setdefault(live.numbers[sequence], {})[sequence] = row
    for number, found in searching.items():
        draws.update(_search(live, number, rows.logits, found, step))
    return draws


def _searches(live: Live, sequence: int) -> bool:
    return live.numbers.get(sequence) in live.searches


def _drawn(sampler: AnySampler, live: Live, drawing: Drawing) -> list[Draw]:
    """What was begun; each alone where that fails."""
    if drawing.sampling is not None:
        try:
            return drawing.sampling.draws()
        except Exception as error:
            if len(drawing.asked) == 1:
                return [Draw(-1, error=str(error))]
    drawn = []
    for _, each, row in drawing.asked:
        if (request := live.requests.get(each)) is None:
            drawn.append(Draw(-1))
            continue
        try:
            drawn += sampler.begin(drawing.rows.logits, [row], [request]).draws()
        except Exception as error:
            drawn.append(Draw(-1, error=str(error)))
    return drawn


def _search(live: Live, number: int, logits: Logits, rows: Mapping[int, int], step: Step) -> dict[int, list[tuple[int, int]]]:
    """How the beams of a search go on; all of them together, or the search has failed."""
    (search, outputs), sequences = live.searches[number], live.sequences[number]
    draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence in sequences}
    error = next((step.errors[sequence] for sequence in sequences if sequence in step.errors), None)
    going: list[tuple[int, int]] = []
    if error is None:
        try:
            going = search.advance(logits.numpy([rows[sequence] for sequence in sequences]))
        except Exception as failure:
            error = said(failure)
    if error is not None:
        step.errors.update(dict.fromkeys(sequences, error))
        return draws
    if not going:
        step.chunks += _found(search, outputs)
        live.drop(number)
        return draws
    beams = []
    for parent, token in going:
        at = sequences[parent]
        beams.append(next(live.ids) if draws[at] else at)
        draws[at].append((beams[-1], token))
    live.replace(number, beams)
    return draws


def _found(search: Search, outputs: Sequence[Request]) -> list[Chunk]:
    """One chunk for each output of a search; those that it did not find are errors."""
    found, chunks = search.best(), list[Chunk]()
    for place, output in enumerate(outputs):
        error = "the search found fewer outputs"
        if place < len(found):
            ended, tokens = found[place].ended, found[place].tokens
            try:
                chunks.append(Chunk(output.index, output.text_of(tokens), tokens, "stop" if ended else "length", output.choice))
                continue
            except Exception as failure:
                error = said(failure)
        chunks.append(Chunk(output.index, "", (), "error", output.choice, error=error))
    return chunks


def said(error: Exception) -> str:
    """Why an output failed: what is not worded for users has its kind named."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
