"""What a body asks for, as the engine's SamplingParams. Raises ConfigError naming the field, for what is out of range."""

import re

from hasten.base.errors import ConfigError, one_line
from hasten.engine import BeamSearch, Grammar, SamplingParams
from hasten.engine.sampling import MAX_INT
from hasten.serve.bodies import ChatBody, CompletionBody, Sampled

NAMES = {"json_schema": "response_format.json_schema.schema"}
"""What OpenAI's API calls fields of `hasten.engine`."""


def of_completion(body: CompletionBody) -> SamplingParams:
    """For ``/v1/completions``. ``max_tokens`` 0, which OpenAI's API has for scoring a prompt, asks for one that is not shown."""
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise ConfigError("max_tokens is 0: that is for echo without stream, to score a prompt; ask for at least one token")
    scored = body.logprobs if body.echo and body.logprobs is not None and body.prompt_logprobs is None else body.prompt_logprobs
    most = 16 if body.max_tokens is None else max(body.max_tokens, 1) if body.max_tokens >= 0 else body.max_tokens
    return _params(body, most, body.logprobs, scored, body.best_of, bool(body.echo))


def of_chat(body: ChatBody, calls: Grammar | None) -> SamplingParams:
    """For ``/v1/chat/completions``, whose answer goes on to the end of the context unless bounded. ``calls`` is the grammar of an answer
    that must be the call of a tool."""
    most = body.max_tokens
    if body.max_completion_tokens is not None and not 1 <= (most := body.max_completion_tokens) <= MAX_INT:
        raise ConfigError(f"max_completion_tokens is {one_line(most)}: give a whole number from 1 to {MAX_INT}")
    if body.top_logprobs is not None and not body.logprobs:
        raise ConfigError("top_logprobs is given without logprobs; set logprobs to true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, MAX_INT if most is None else most, logprobs, body.prompt_logprobs, None, False, calls)


def _params(
    body: Sampled, most: int, logprobs: int | None, prompt_logprobs: int | None, best_of: int | None, echo: bool,
    calls: Grammar | None = None,
) -> SamplingParams:  # fmt: skip
    def given(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else value

    searching = body.beam_width is not None
    return SamplingParams(
        max_tokens=most, temperature=0.0 if searching and "temperature" not in body.model_fields_set else given(body.temperature, 1.0),
        top_p=given(body.top_p, 1.0), top_k=body.top_k, min_p=body.min_p, repetition_penalty=body.repetition_penalty,
        presence_penalty=given(body.presence_penalty, 0.0), frequency_penalty=given(body.frequency_penalty, 0.0), seed=body.seed,
        stop=() if body.stop is None else body.stop, stop_token_ids=body.stop_token_ids or (), ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens, n=1 if body.n is None else body.n, best_of=best_of, logit_bias=body.logit_bias or (),
        logprobs=logprobs, prompt_logprobs=prompt_logprobs, echo=echo, grammar=grammar_of(body, calls),
        beam=BeamSearch(width=body.beam_width, length_penalty=body.length_penalty, early_stopping=body.early_stopping)
        if body.beam_width is not None else None,
    )  # fmt: skip


def grammar_of(body: Sampled, calls: Grammar | None) -> Grammar | None:
    """The one grammar asked for, if any."""
    asked: dict[str, Grammar] = {} if calls is None else {"tool_choice": calls}
    form = body.response_format
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ConfigError("response_format is json_schema without a json_schema; give one")
        asked["response_format"] = Grammar.json_schema(form.json_schema.schema_)
    elif form is not None and form.type == "json_object":
        asked["response_format"] = Grammar.json_object()
    if body.regex is not None:
        asked["regex"] = Grammar.regex(body.regex)
    if body.grammar is not None:
        asked["grammar"] = Grammar.lark(body.grammar)
    if body.choices is not None:
        asked["choices"] = Grammar.regex("|".join(map(_literal, body.choices)))
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are both given: an output follows one grammar; leave one of them out")
    return next(iter(asked.values()), None)


def grammar_field(body: Sampled) -> str | None:
    """The field that gives the output's grammar, if one does."""
    fields = {"response_format": body.response_format, "regex": body.regex, "grammar": body.grammar, "choices": body.choices}
    return next(
        (name for name, value in fields.items() if value is not None), "tools" if isinstance(body, ChatBody) and body.tools else None
    )


def _literal(text: str) -> str:
    """A regular expression of exactly this text."""
    if not text:
        raise ConfigError("choices holds an empty text; give texts of at least one character")
    return "(" + re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text).replace("\n", r"\n") + ")"
