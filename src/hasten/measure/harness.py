"""What lm-eval asks of a language model, played by hasten: log-likelihoods of continuations and of whole texts, and greedy generation.

Prompts are begun, cut and padded as lm-eval 0.4.13 does for transformers (its ``HFLM``), so that figures compare."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hasten.base.errors import ConfigError, UnsupportedError, UserError, one_line
from hasten.engine import LLM, SamplingParams
from hasten.engine.backends import AUTO, choose_backend, open_session
from hasten.engine.stepper import Sequences, Stepper
from hasten.model import Model
from hasten.program import Batch, Formats

LOGITS_BYTES = 16 << 20  # held at a time
STEP_TOKENS = 8192  # of contexts played together
GENERATED = 256
"""Tokens that a task generates unless it says how many."""

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


class Harness:
    """Scores and continues text with ``model``, ``together`` sequences at a time. ``report`` hears how many requests are done, and of how
    many. Scoring and generating have a session each, made when it is first needed."""

    def __init__(
        self, model: Model, *, backend: str = AUTO, formats: Formats | None = None, together: int = 16,
        report: Callable[[str, int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, model.text_tokenizer()
        self._backend, self._formats, self._together = choose_backend(model, backend, formats)[0], formats, together
        self._report = report or (lambda doing, done, of: None)
        self._stepper: Stepper | None = None
        self._llm: LLM | None = None

    @property
    def end_id(self) -> int | None:
        """The token that ends a text, None where the model has none."""
        named = self.tokenizer.special_tokens.get("eos_token")
        found = None if named is None else self.tokenizer.id_of(named)
        return found if found is not None else next(iter(self.model.eos_token_ids), None)

    @property
    def start_id(self) -> int:
        """The token that a text is scored from where nothing stands before it: the start, or else the end of a text."""
        found = self.tokenizer.start_id if self.tokenizer.start_id is not None else self.end_id
        if found is None:
            raise UserError(f"{self.model.name} has no token that begins or ends a text, so its first token cannot be scored")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, begun as the tokenizer begins it unless ``text`` says its start itself."""
        start = self.tokenizer.start_id if self.tokenizer.start_id is not None else self.end_id
        begun = start is not None and text.startswith(self.tokenizer.decode([start], skip_special_tokens=False))
        return self.tokenizer.encode(text, add_special_tokens=not begun)

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation in nats, and whether it is the greedy one. A context
        that is too long loses its beginning. Raises UserError for a continuation that is empty, or longer than the model's context."""
        return self._scores([self._pair(context, continuation) for context, continuation in requests], "log-likelihoods")

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text in nats, in windows as long as the model's context, each begun with the token before it and
        the last with as much as there is room for."""
        pairs, owners = [], []
        for number, text in enumerate(texts):
            for pair in rolling_windows(self.encode(text), self.start_id, self.model.spec.context):
                pairs.append(pair)
                owners.append(number)
        found = [0.0] * len(texts)
        for owner, (score, _) in zip(owners, self._scores(pairs, "log-likelihoods")):
            found[owner] += score
        return found

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What each (context, settings) goes on with, up to the first of its ``until``. A context that leaves no room loses its beginning.

        Raises UnsupportedError for a setting that hasten does not know."""
        prompts, params = [], []
        for context, settings in requests:
            its = generation(settings, self.end_id)
            room = self.model.spec.context - its.max_tokens
            if room < 1:
                raise ConfigError(
                    f"a task asks for {its.max_tokens} tokens, and {self.model.name} holds {self.model.spec.context} with the prompt's"
                )
            prompts.append((self.encode(context) or [self.start_id])[-room:])
            params.append(its)
        if not prompts:
            return []
        if self._llm is None:
            self._llm = LLM(self.model, backend=self._backend, formats=self._formats, max_sequences=self._together)
        texts = [""] * len(prompts)
        for done, (place, (completion,)) in enumerate(self._llm.finished(prompts, params), 1):
            if completion.error is not None:
                raise UserError(completion.error)
            texts[place] = until(self.tokenizer.decode(completion.token_ids), params[place].stop)
            self._report("generating", done, len(prompts))
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both. Spaces that end the context begin the continuation, where tokenizers of words want them."""
        if not context:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.start_id] else ([self.start_id], ids)
        stem = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(stem)
        return before or [self.start_id], whole[len(before) :]

    def _scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], doing: str) -> list[tuple[float, bool]]:
        """Requests with the same context are played from one copy of it, requests that are the same once."""
        longest, asked = self.model.spec.context, dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]]()
        for place, (context, continuation) in enumerate(pairs):
            if not 1 <= len(continuation) <= longest:
                raise UserError(f"a continuation of {len(continuation)} tokens cannot be scored; {self.model.name} takes 1 to {longest}")
            kept = tuple(context[-(longest + 1 - len(continuation)) :])
            asked.setdefault((kept, tuple(continuation)), []).append(place)
        by_context: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for context, continuation in asked:
            by_context.setdefault(context, []).append(continuation)
        found, done = [(0.0, False)] * len(pairs), 0
        for contexts in _together(sorted(by_context, key=len, reverse=True), self._together):
            members = [(context, continuation) for context in contexts for continuation in by_context[context]]
            for pair, score in zip(members, self._played(contexts, members), strict=True):
                for place in asked[pair]:
                    found[place] = score
                    done += 1
            self._report(doing, done, len(pairs))
        return found

    def _played(
        self, contexts: Sequence[tuple[int, ...]], members: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[tuple[float, bool]]:
        """The contexts, less their last token; then that token and the continuation of each member, in steps of as many logits as may be
        held."""
        if self._stepper is None:
            self._stepper = Stepper(open_session(self.model, self._backend, self.model.spec.context, self._formats))
        stepper, state = self._stepper, self._stepper.start(len(contexts))
        if longer := [place for place, context in enumerate(contexts) if len(context) > 1]:
            stepper.step(Batch.of([contexts[place][:-1] for place in longer], rows="none"), state.select(longer))
        state = state.select([contexts.index(context) for context, _ in members])
        tails = [[context[-1], *continuation] for context, continuation in members]
        rows, found = max(1, LOGITS_BYTES // (4 * self.model.spec.vocab)), list[tuple[float, bool]]()
        for part in _within([len(tail) - 1 for tail in tails], rows):
            found += self._tails(stepper, state.select(part), [tails[place] for place in part], rows)
        return found

    def _tails(self, stepper: Stepper, state: Sequences, tails: Sequence[Sequence[int]], rows: int) -> list[tuple[float, bool]]:
        """Of each tail: the log-probability of all but its first token, and whether each was the likeliest. Together they have no more than
        ``rows`` tokens to score, or there is one, which is played in pieces."""
        sums, greedy = np.zeros(len(tails)), np.ones(len(tails), bool)
        for begin in range(0, max(map(len, tails)) - 1, rows):
            pieces = [list(tail[begin : begin + rows + 1]) for tail in tails]
            targets = np.concatenate([piece[1:] for piece in pieces])
            of = np.repeat(np.arange(len(tails)), [len(piece) - 1 for piece in pieces])
            asked = Batch.of([piece[:-1] for piece in pieces], [one.length for one in state.sequences])
            logits, state = stepper.step(asked, state)
            top = logits.max(axis=-1)
            if not np.isfinite(top).all():
                raise UserError(f"{self.model.name}: the model's logits are not finite, so there is no likelihood; check its weights")
            np.logical_and.at(greedy, of, logits.argmax(axis=-1) == targets)
            picked = logits[np.arange(len(targets)), targets].astype(np.float64) - top
            logits -= top[:, None]
            np.exp(logits, out=logits)
            sums += np.bincount(of, weights=picked - np.log(logits.sum(axis=-1, dtype=np.float64)), minlength=len(tails))
        return [(float(total), bool(likeliest)) for total, likeliest in zip(sums, greedy)]


def rolling_windows(ids: Sequence[int], start: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each of ``ids`` once, none of more than ``longest`` + 1 tokens together: whole windows in
    a row, and for the last as much context as there is room for."""
    windows = [([start], list(ids[:longest]))] if ids else []
    for begin in range(longest, len(ids), longest):
        end = min(begin + longest, len(ids))
        windows.append((list(ids[end - longest - 1 : begin]), list(ids[begin:end])))
    return windows


def generation(settings: Mapping[str, Any], end: int | None) -> SamplingParams:
    """A task's ``generation_kwargs`` as hasten has them; greedy unless they say otherwise, as in lm-eval. Raises UnsupportedError naming
    what hasten does not know, ConfigError for what is out of range."""
    given = dict(settings)
    most = next((given[name] for name in _MOST if given.get(name) is not None), GENERATED)
    stops = given.pop("until", None) or ()
    temperature, sampled = given.pop("temperature", 0.0), given.pop("do_sample", None)
    kept = {name: given.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed") if given.get(name) is not None}
    if sampled and not temperature:
        temperature = 1.0
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    left = sorted(name for name, value in given.items() if name not in _MOST and value is not None and value != neutral.get(name, ...))
    if left:
        accepted = ", ".join(("until", *_MOST, "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"))
        raise UnsupportedError(f"a task asks to generate with {', '.join(map(one_line, left))}; hasten knows {accepted}")
    texts = [text for text in ([stops] if isinstance(stops, str) else stops) if text]
    return SamplingParams(
        max_tokens=int(most), temperature=0.0 if sampled is False else float(temperature), stop=tuple(texts),
        stop_token_ids=() if end is None else (end,), **kept,
    )  # fmt: skip


def until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _together(contexts: Sequence[tuple[int, ...]], most: int) -> list[list[tuple[int, ...]]]:
    """In order, as many as may be played together, at least one."""
    batches: list[list[tuple[int, ...]]] = []
    for context in contexts:
        last = batches[-1] if batches else []
        if not last or len(last) == most or sum(map(len, last)) + len(context) > STEP_TOKENS:
            batches.append([context])
        else:
            last.append(context)
    return batches


def _within(lengths: Sequence[int], most: int) -> list[range]:
    """Places in a row whose lengths come to no more than ``most``, or one that alone comes to more."""
    parts, begin, total = [], 0, 0
    for place, length in enumerate(lengths):
        if place > begin and total + length > most:
            parts.append(range(begin, place))
            begin, total = place, 0
        total += length
    return [*parts, range(begin, len(lengths))]
