"""Preparing requests: from a prompt and what is asked of it to what an engine takes."""

import dataclasses
import functools
import itertools
import secrets
from collections.abc import Sequence

from hasten.base.errors import ConfigError
from hasten.engine.answer import Answer
from hasten.engine.detokenize import Detokenizer, byte_token_ids
from hasten.engine.engine import Engine
from hasten.engine.plan import NeverFitsError
from hasten.engine.request import Chunk, Request
from hasten.engine.sampling import SamplingParams, check_ids
from hasten.model import Model
from hasten.program import lowering_contexts, token_array

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixKey:
    """What two requests must have in common to share what they begin with, beside the tokens."""

    model: str
    cache: str | None
    adapter: str = ""
    exits: str = ""
    tenant: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready for an `Engine`: the ``outputs`` to make of its prompt, and what its prefixes may be shared by."""

    outputs: tuple[Request, ...]
    key: PrefixKey
    priority: int = 0

    @property
    def index(self) -> int:
        """Its number, no other request's of the same `Preparer`: the ``index`` of its chunks."""
        return self.outputs[0].index

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids."""
        return self.outputs[0].prompt

    @property
    def context(self) -> int:
        """Of the Program that serves it: give it to `LLM.engine`."""
        return self.outputs[0].program_context

    def answer(self) -> Answer:
        """Where to collect its chunks."""
        return Answer(self.outputs)

    def submit(self, engine: Engine) -> list[int]:
        """Hand it to ``engine``, once; the numbers under which ``engine.abort`` knows it. More outputs than run together come in turns.

        Raises NeverFitsError for what could not run even alone. Whatever it raises, nothing stays handed in."""
        slots = engine.scheduler.settings.batching.slots
        together = len(self.outputs) if self.outputs[0].params.beam is not None else slots
        numbers = list[int]()
        try:
            for begin in range(0, len(self.outputs), together):
                numbers.append(engine.submit(self.outputs[begin : begin + together], priority=self.priority, key=self.key))
        except Exception:
            for number in numbers:
                engine.abort(number)
            raise
        return numbers

    def refused(self, error: str) -> list[Chunk]:
        """The last chunk of each output, for a request that no engine takes."""
        return [output.end("error", error) for output in self.outputs]


class Preparer:
    """Prepares requests for ``model``: of at most ``context`` tokens, prompt and output together, ``slots`` of which run together, on a
    cache of the format ``cache``. One thread at a time."""

    def __init__(self, model: Model, *, context: int, slots: int, cache: str | None = None) -> None:
        self.model, self.context = model, context
        self.contexts = lowering_contexts(model.spec, context)
        """Of the Programs that serve requests, ascending; a request is served by the first in which it has room."""
        self._slots, self._cache = slots, cache
        self._numbers = itertools.count()

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, tenant: str = "", priority: int = 0, name: str = "the prompt"
    ) -> Prepared:  # fmt: skip
        """One request; its prefixes are shared with those of the same ``tenant`` alone. ``name`` is what errors call the prompt.

        Raises ConfigError, UnsupportedError or NeverFitsError for what this model cannot be asked for."""
        ids = self.prompt_ids(prompt, name)
        self.check_params(params)
        needed = min(len(ids) + params.max_tokens, self.context)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        number, context = next(self._numbers), next(context for context in self.contexts if needed <= context)
        outputs = tuple(
            Request(
                number, ids, params, limit=self.context, end_ids=frozenset(self.model.eos_token_ids), detokenizer=self._detokenizer(),
                program_context=context, choice=choice, seed=seed,
            )
            for choice in range(params.choices)
        )  # fmt: skip
        return Prepared(outputs, PrefixKey(self.model.name, self._cache, tenant=tenant), priority)

    def check_params(self, params: SamplingParams) -> None:
        """Raises ConfigError, UnsupportedError or NeverFitsError for what this model cannot be asked for, whatever the prompt."""
        check_ids(params, self.model.spec.vocab)
        if params.stop or params.grammar is not None or params.echo:
            self.model.text_tokenizer()  # these need text
        if params.beam is None:
            return
        if params.grammar is not None and not self.model.eos_token_ids:
            raise ConfigError(
                f"beam search with a grammar needs an end of text, which {self.model.name} has none of; leave one of them out"
            )
        if params.beam.width > self._slots:
            raise NeverFitsError(
                f"the beam width is {params.beam.width}, and {self._slots} sequences run together; a search's beams all do: use a width "
                f"of at most {self._slots}, or let more run together"
            )

    def prompt_ids(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """Token ids of a prompt, which is called ``name`` in errors. Raises ConfigError for one that this model does not take."""
        ids: list[int] = self.encode(prompt) if isinstance(prompt, str) else token_array(prompt).tolist()
        vocab = self.model.spec.vocab
        if max(ids) >= vocab:
            raise ConfigError(f"{name}: token id {max(ids)} is outside the vocabulary; accepted are 0 to {vocab - 1}")
        if len(ids) >= self.context:
            raise ConfigError(
                f"{name} has {len(ids)} tokens; with a context of {self.context} at most {self.context - 1} leave room to answer"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, begun as the model's own tokenizer begins it; an empty one is the document start alone."""
        tokenizer = self.model.text_tokenizer()
        ids = tokenizer.encode(text)
        start = tokenizer.start_id
        if start is not None and (not ids or (tokenizer.settings.get("add_bos_token") is True and ids[0] != start)):
            ids = [start, *ids]
        if not ids:
            raise ConfigError("the prompt is empty and this model has no document-start token; give at least one character")
        return ids

    def _detokenizer(self) -> Detokenizer | None:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return None
        return Detokenizer(tokenizer.decode, skipped_ids=tokenizer.special_ids, byte_ids=self._byte_ids)

    @functools.cached_property
    def _byte_ids(self) -> frozenset[int]:
        return byte_token_ids(self.model.text_tokenizer().vocabulary)
