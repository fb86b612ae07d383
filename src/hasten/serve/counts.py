"""Counts: what the server's own process counts, for `/metrics`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from hasten.serve.histogram import SECONDS, TOKENS, Histogram
from hasten.serve.messages import Piece

GONE = 499
"""The status that is counted for a client which went away before it was answered."""


EndReason = Literal["stop", "length", "abort", "error"]
"""Of outputs: as the engine ends them, or because nobody wanted them any more."""


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _tokens() -> Histogram:
    return Histogram(TOKENS)


@dataclass(slots=True)
class Counts:
    """Since the server began. Whoever has something to count adds to a field; one thread does."""

    prompt_tokens: int = 0
    """Of prompts of which something came."""
    output_tokens: int = 0
    """That came of them."""
    ended: dict[EndReason, int] = field(default_factory=lambda: dict.fromkeys(get_args(EndReason), 0))
    """Outputs, by why they ended."""
    answers: dict[tuple[str, int], int] = field(default_factory=dict)
    """HTTP requests, by route and status."""
    loop_lag: Histogram = field(default_factory=_seconds)
    """Of the event loop."""
    # of outputs
    first_token: Histogram = field(default_factory=_seconds)
    inter_token: Histogram = field(default_factory=_seconds)
    per_token: Histogram = field(default_factory=_seconds)
    whole: Histogram = field(default_factory=_seconds)
    queue: Histogram = field(default_factory=_seconds)
    prefill: Histogram = field(default_factory=_seconds)
    decode: Histogram = field(default_factory=_seconds)
    prompt_lengths: Histogram = field(default_factory=_tokens)
    output_lengths: Histogram = field(default_factory=_tokens)

    def answered(self, route: str, status: int) -> None:
        """An HTTP request has ended. ``route`` is one of the server's, never a client's words."""
        key = route, status or GONE
        self.answers[key] = self.answers.get(key, 0) + 1


class Tally:
    """Counts the outputs of one HTTP request, ``n`` of each of its prompts, as their news come. ``began`` is when the request came, by the
    clock whose times `take` gets."""

    def __init__(self, counts: Counts, began: float, prompts: list[int], n: int) -> None:
        self._counts, self._began, self._prompts, self._n = counts, began, prompts, n
        outputs = n * len(prompts)
        self._begun = [False] * len(prompts)
        self._first, self._last, self._tokens = [0.0] * outputs, [0.0] * outputs, [0] * outputs

    def take(self, output: int, piece: Piece, submitted: float, waited_s: float, now: float) -> None:
        """News of one output, whose prompt went to the engine at ``submitted`` and joined the batch ``waited_s`` later."""
        counts = self._counts
        place = output // self._n
        if not self._begun[place]:
            self._begun[place] = True
            counts.prompt_tokens += self._prompts[place]
        if count := len(piece.token_ids):
            counts.output_tokens += count
            self._tokens[output] += count
            if (last := self._last[output]) > 0.0:
                counts.inter_token.observe(now - last)
            else:
                self._first[output] = now
                counts.first_token.observe(now - self._began)
            self._last[output] = now
        if piece.finish_reason is not None:
            self._end(output, piece.finish_reason, submitted, waited_s, now)

    def cut(self, outputs: int, reason: EndReason) -> None:
        """So many ended otherwise: 'abort' where nobody wanted them any more, 'error' where they failed."""
        self._counts.ended[reason] += outputs

    def _end(self, output: int, reason: EndReason, submitted: float, waited_s: float, now: float) -> None:
        counts, tokens, first = self._counts, self._tokens[output], self._first[output] or now
        counts.ended[reason] += 1
        counts.whole.observe(now - self._began)
        counts.queue.observe(waited_s)
        counts.prefill.observe(max(0.0, first - submitted - waited_s))
        counts.decode.observe(now - first)
        if tokens > 1 and now > first:
            counts.per_token.observe((now - first) / (tokens - 1))
        counts.prompt_lengths.observe(self._prompts[output // self._n])
        counts.output_lengths.observe(tokens)
