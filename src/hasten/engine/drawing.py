"""Drawing: from logits to how each sequence goes on, into outputs that are drawn or into the beams of a search."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hasten.base.errors import UserError
from hasten.engine.draw import Draw
from hasten.engine.forward import Rows
from hasten.engine.live import Live, Step
from hasten.engine.request import Chunk, Request
from hasten.engine.search import Search

if TYPE_CHECKING:
    from hasten.engine.sampler import Sampler

Asked = tuple[int, int, NDArray[np.float32]]
"""A drawing sequence, the sequence that the token is for, and the logits."""


def draw(sampler: "Sampler", live: Live, rows: Rows, step: Step) -> dict[int, list[tuple[int, int]]]:
    """How each sequence goes on: at the end of its prompt, into all outputs of its request; in a search, into the beams that continue
    it."""
    draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence, _ in rows}
    asked: list[Asked] = []
    searching: dict[int, dict[int, NDArray[np.float32]]] = {}
    for sequence, row in rows:
        if live.searches and (number := live.numbers[sequence]) in live.searches:
            searching.setdefault(number, {})[sequence] = row
            continue
        begins = sequence in live.sequences and not live.requests[sequence].output
        asked += [(sequence, each, row) for each in (live.sequences[sequence] if begins else [sequence])]
    for (sequence, each, _), drawn in zip(asked, _drawn(sampler, live, asked) if asked else (), strict=True):
        if drawn.error is not None:
            request = live.requests[each]
            why = request.constraint.error if request.constraint is not None else None
            step.chunks.append(request.end("error", why or drawn.error))
            live.forget(each)
            continue
        draws[sequence].append((each, drawn.token))
        if drawn.logprob is not None:
            step.logprobs[each] = drawn.logprob
    for number, found in searching.items():
        draws.update(_search(live, number, found, step))
    return draws


def _drawn(sampler: "Sampler", live: Live, asked: Sequence[Asked]) -> list[Draw]:
    try:
        return sampler.draw(np.stack([row for _, _, row in asked]), [live.requests[each] for _, each, _ in asked])
    except Exception as error:
        if len(asked) == 1:
            return [Draw(-1, error=str(error))]
        return [drawn for one in asked for drawn in _drawn(sampler, live, [one])]


def _search(live: Live, number: int, rows: Mapping[int, NDArray[np.float32]], step: Step) -> dict[int, list[tuple[int, int]]]:
    """How the beams of a search go on; all of them together, or the search has failed."""
    (search, outputs), sequences = live.searches[number], live.sequences[number]
    draws: dict[int, list[tuple[int, int]]] = {sequence: [] for sequence in sequences}
    error = next((step.errors[sequence] for sequence in sequences if sequence in step.errors), None)
    going: list[tuple[int, int]] = []
    if error is None:
        try:
            going = search.advance(np.stack([rows[sequence] for sequence in sequences]))
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
