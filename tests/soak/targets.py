"""What is fuzzed: six functions from any bytes to nothing, which raise `Broken` where something holds that must not, and let through any
exception that is no answer to bad input. Each has inputs to begin with, and words that matter to it."""

import functools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.base.errors import CheckpointError, ConfigError, UserError
from hasten.checkpoint import bundled_directory
from hasten.engine.chat import MAX_SECONDS, PLAIN_TEMPLATE, render_chat
from hasten.engine.constraint import Constraints
from hasten.engine.detokenize import Detokenizer, StopMatcher, byte_token_ids
from hasten.engine.grammar import Grammar
from hasten.formats.safetensors import SafetensorsFile
from hasten.model.tokenizer import Tokenizer, find_tokenizer
from hasten.serve.tools import Call, Offer, Voice, grammar_of_calls

ANSWER_S = 2.5
"""A grammar is known or refused by then, on a machine that does little else."""
VOCAB, END = 8192, 0
FOLLOWED = 6
"""Tokens that a grammar is followed for."""


class Broken(Exception):
    """Something that must always hold does not."""


@dataclass(frozen=True)
class Target:
    """``run`` takes any bytes. ``seeds`` are inputs to begin with, ``words`` pieces worth putting in; ``of`` are the modules of hasten that
    it is about: what is known of it holds as long as they stay."""

    run: Callable[[bytes], None]
    of: Sequence[str]
    seeds: Sequence[bytes]
    words: Sequence[bytes]


def require(holds: bool, otherwise: str) -> None:
    """Raises Broken."""
    if not holds:
        raise Broken(otherwise)


def text_of(data: bytes) -> str:
    """Any bytes as text, with half surrogate pairs where they are none."""
    return data.decode("utf-8", "surrogateescape")


# --- chat templates


def template(data: bytes) -> None:
    """A template; or messages for a plain one, where the first byte is odd."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a\nb"}, {"role": "user", "content": "é🙂"}]
    source: str | None = text_of(data[1:])
    if data[:1] and data[0] & 1:
        source, chat = None, [{"role": "user", "content": text_of(data[1:])}, *chat]
    before, began = json.dumps(chat), time.thread_time()
    try:
        made = render_chat(source, chat, add_generation_prompt=True, special_tokens={"bos_token": "<s>"})
    except UserError as error:
        require("\n" not in str(error) and len(str(error)) < 1000, f"the error is no line: {error!r}")
    else:
        require(isinstance(made, str) and len(made) <= 4 << 20, "the output is no text, or too long")
        if source is None:
            require(text_of(data[1:]) in made, "a message is not in the plain template's text")
    require(json.dumps(chat) == before, "the template changed the messages")
    require(time.thread_time() - began < MAX_SECONDS + 3, "the template took too long")


# --- grammars and schemas


@functools.cache
def constraints() -> Constraints:
    """One for all inputs, as an engine has."""
    return Constraints(bundled_directory("code-8m") / "tokenizer.json", VOCAB, [END])


def _follow(grammar: Grammar, choose: random.Random) -> None:
    every = constraints()
    process = every._taster._process
    state = every.start(grammar)
    began = time.monotonic()
    try:
        known = every.wait(30, [state])
        late = time.monotonic() - began
        require(known, f"nothing is known of {grammar} after 30 s")
        require(late < ANSWER_S or os.getloadavg()[0] > (os.cpu_count() or 1), f"{grammar} took {late:.1f} s to be known")
        for _ in range(FOLLOWED):
            if state.error is not None or state.complete:
                break
            require(state.mask is not None, f"{grammar} has neither mask nor end nor error")
            ids = np.flatnonzero(np.unpackbits(state.mask.view(np.uint8), bitorder="little"))
            require(len(ids) > 0 and int(ids[-1]) < VOCAB, f"{grammar} allows nothing, or ids that there are none of")
            token = int(ids[choose.randrange(len(ids))])
            if token == END:
                break
            state.advance(token)
            require(every.wait(30, [state]), f"{grammar} hangs")
        require(state.error is None or "\n" not in state.error, f"the error is no line: {state.error!r}")
    finally:
        state.close()
    require(process is None or every._taster._process is process, f"{grammar} ended the process that compiles")


def grammar(data: bytes) -> None:
    """A regular expression, or a grammar in Lark's syntax where the first byte is odd."""
    kind = "lark" if data[:1] and data[0] & 1 else "regex"
    try:
        made = Grammar(kind, text_of(data[1:]))
    except ConfigError as error:
        require("\n" not in str(error), f"the error is no line: {error!r}")
        return
    _follow(made, random.Random(len(data)))


def schema(data: bytes) -> None:
    """A JSON Schema, of an answer or of a tool's arguments where the first byte is odd."""
    text = text_of(data[1:])
    try:
        if data[:1] and data[0] & 1:
            try:
                given = json.loads(text)
            except (ValueError, RecursionError):
                return
            made = grammar_of_calls([{"name": "f", "parameters": given}])
        else:
            made = Grammar.json_schema(text)
    except ConfigError as error:
        require("\n" not in str(error), f"the error is no line: {error!r}")
        return
    _follow(made, random.Random(len(data)))


# --- text out of tokens


@functools.cache
def _tokenizer() -> Tokenizer:
    found, _ = find_tokenizer(bundled_directory("code-8m"))
    if found is None:
        raise Broken("the bundled model has no tokenizer")
    return found


def detokenizer(data: bytes) -> None:
    """Token ids, two bytes each, fed in portions that the same bytes say; and a stop string of the text that comes out."""
    tokenizer = _tokenizer()
    ids = [(data[at] << 8 | data[at + 1]) % VOCAB for at in range(0, len(data) - 1, 2)]
    skipped = tokenizer.special_ids
    stream, told, at = Detokenizer(tokenizer.decode, skipped_ids=skipped, byte_ids=byte_token_ids(tokenizer.vocabulary)), [], 0
    while at < len(ids):
        size = 1 + data[at] % 5
        told.append(stream.feed(ids[at : at + size]))
        at += size
    told.append(stream.flush())
    whole = tokenizer.decode(ids)
    require("".join(told) == whole, f"{ids}: {told} is not {whole!r}")
    if len(whole) < 2:
        return
    begin = len(whole) * (data[0] + 1) // 300
    stop = whole[begin : begin + 1 + data[-1] % 6]
    matcher, said = StopMatcher([stop, "never to be found"]), []
    for piece in told:
        text, _ = matcher.feed(piece)
        said.append(text)
    require(matcher.stopped == stop and "".join(said) == whole[: whole.index(stop)], f"{ids}: stop {stop!r}: {said}")


# --- checkpoints


def safetensors(data: bytes) -> None:
    """A file."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        began = time.monotonic()
        try:
            file = SafetensorsFile.open(Path(f"/proc/self/fd/{descriptor}"))
            for name, entry in file.entries.items():
                array = file.read(name)
                require(array.nbytes <= len(data), f"{name} is larger than its file")
                require(array.dtype == entry.dtype and tuple(array.shape) == tuple(entry.shape), f"{name} is not what its header says")
                array.tobytes()  # every byte can be read
        except CheckpointError as error:
            require(str(error).isprintable(), f"the error is no line: {error!r}")
        require(time.monotonic() - began < 5, "it took too long")
    finally:
        os.close(descriptor)


# --- calls of tools


def tools(data: bytes) -> None:
    """A model's answer, whole and in portions that its length says."""
    text, size = text_of(data), 1 + len(data) % 13

    def read(portions: Sequence[str]) -> tuple[str, list[Call]]:
        voice, found = Voice(Offer((), ("f", "g"))), []
        for place, portion in enumerate(portions):
            found += voice.says(portion, place == len(portions) - 1)
        return "".join(one for one in found if isinstance(one, str)), [one for one in found if isinstance(one, Call)]

    said, calls = read([text])
    require((said, calls) == read([text[at : at + size] for at in range(0, len(text), size)] or [""]), "it hangs on the portions")
    require(bool(calls) or said == text, "text is lost")
    for call in calls:
        require(call.name in {"f", "g"} and isinstance(call.values, dict), f"{call} is none that was offered")
        call.arguments.encode()


def _files() -> list[bytes]:
    def file(header: str, data: bytes = b"") -> bytes:
        return len(header).to_bytes(8, "little") + header.encode() + data

    two = '{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}'
    return [
        file("{}"), file(two, bytes(14)), file('{"__metadata__":{"format":"pt"},"é":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
        file('{"a":{"dtype":"I64","shape":[0,9],"data_offsets":[0,0]}}   '),
        file('{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', b"\1"),
    ]  # fmt: skip


CALLS = [
    '<tool_call>{"name": "f", "arguments": {"a": [1, "é"]}}</tool_call>',
    '[{"name": "g", "parameters": {}}]',
    'text <tool_call>{"name"',
]
GRAMMARS = ("engine.grammar", "engine.constraint", "engine.grammar_worker")

TARGETS = {
    "template": Target(
        template, ("engine.chat",),
        [b"\0" + PLAIN_TEMPLATE.encode(),
         b"\0{% for m in messages if m.role %}{{ m['content'] | trim ~ loop.index }}{% endfor %}",
         b"\0{% macro f(x, y=1) %}{{ x }}{% endmacro %}{% set ns = namespace(a=[]) %}{% set ns.a = ns.a + [f(2)] %}{{ ns.a | tojson }}",
         b"\0{{ '%5d' % 3 ~ 'ab' * 2 }}{% generation %}{{ bos_token.upper()[::-1] }}{% endgeneration %}", b"\1{{ 7 * 7 }}{% raw %}\xff"],
        [b"{{", b"}}", b"{%", b"%}", b"|", b"**9", b"*9999", b"range(9)", b".__class__", b"[::2]", b"loop", b"recursive", b"| map('list')",
         b"~", b"'", b"raise_exception", b"| indent(9)", b".format(1)", b"cycler", b"namespace", b"{% for x in y %}", b"{% endfor %}"],
    ),
    "grammar": Target(
        grammar, GRAMMARS,
        [rb"[a-c]{2,5}|(x|y)*z", "\0é+[^\\d\"]?\\w{3}".encode(), b"\0(a+)+b", b'\1start: "a" b+\nb: /[0-9]{2}/ | "(" start ")"',
         b'\1start: %json {"type": "integer"}', b"\1start: A~3\nA: /x/ & /[a-z]/\n%ignore / /"],
        [b"(", b")", b"*", b"+", b"{9}", b"{1,999}", b"[^", b"]", b"\\p{L}", b"|", b"&", b"~", b"start:", b"%json", b"%ignore", b"/",
        b'"', b"\\x00",
         b"(?i)", b"(?=a)", b"\\1", b"\n"],
    ),
    "schema": Target(
        schema, (*GRAMMARS, "serve.tools"),
        [b'\0{"type":"object","properties":{"a":{"type":"string","pattern":"^[^\\"]{1,4}$"}},"required":["a"],"additionalProperties":false}',
         b'\0{"anyOf":[{"const":1},{"$ref":"#/$defs/x"}],"$defs":{"x":{"type":"array","items":{"enum":["a",null]},"minItems":1}}}',
         b'\0{"type":"integer","minimum":-3,"multipleOf":2}', b'\1{"type":"object","properties":{"a":{"$ref":"#"}}}', b"\0true",
         b'\1{"allOf":[{}]}'],
        [b'"type":', b'"object"', b'"array"', b'"$ref":"#"', b'"allOf":[', b'"oneOf":[', b'"not":', b'"pattern":"', b'"minLength":',
        b"1e9", b"-1", b"{}",
         b'"format":"date"', b'"uniqueItems":true', b'"patternProperties":', b'"maxItems":', b"null", b"NaN", b'"x-guidance":'],
    ),
    "detokenizer": Target(
        detokenizer, ("engine.detokenize", "model.tokenizer"),
        [bytes(range(64)), "é🙂日本語".encode() * 4, b"\x00\x01\x00\x00\x00\x01", b"\x00\xe2\x00\x80\x00\xa6" * 5, b"\x00\xf0" * 20],
        [b"\x00\x00", b"\x00\xff", b"\x00\x80", b"\x01\x00", b"\x1f\xff"],
    ),
    "safetensors": Target(
        safetensors, ("formats.safetensors", "formats.mapped"), _files(),
        [b'"dtype":', b'"F64"', b'"BOOL"', b'"shape":[', b"-1", b"9999999999999999999", b"1e3", b'"data_offsets":[', b"{", b"}", b"[",
        b"null",
         b'"__metadata__":{', b"\\u0000", b"\xff", b" ", b",", b"0"],
    ),
    "tools": Target(
        tools, ("serve.tools",), [call.encode() for call in CALLS],
        [b"<tool_call>", b"</tool_call>", b'{"name": "f"', b'"arguments":', b"{", b"}", b"[", b"]", b"\\ud800", b"NaN", b"1e999", b",",
        b"\x00", b"9" * 400],
    ),
}  # fmt: skip


def mutated(target: Target, chance: random.Random) -> bytes:
    """One of a target's inputs with something done to it: what stands in for a guided fuzzer where a test has seconds."""
    data = bytearray(chance.choice(target.seeds))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6, 12))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + chance.randrange(1, 9)]
            case 2 | 3:
                data[at:at] = chance.choice(target.words) * chance.choice((1, 1, 1, 2, 40))
            case 4:
                other = chance.randrange(len(data) + 1)
                data[at:at] = data[other : other + chance.randrange(1, 60)]
            case 5:
                other_seed = chance.choice(target.seeds)
                data[at:] = other_seed[chance.randrange(len(other_seed) + 1) :]
            case _:
                data[at:at] = chance.randbytes(chance.randrange(1, 5))
    return bytes(data)
