"""The process that compiles and follows grammars, so that a hostile one ends this process and nothing else.

Started as a program by `hasten.engine.constraint`, with its settings as one JSON argument. It reads frames from standard input and answers
every operation that asks for a mask with one frame on standard output, in order. A frame is 4 bytes of length (little-endian) and so many
bytes: in, a JSON list of operations; out, a byte that says how things stand and what belongs to it. Each operation may use
``seconds`` of processor time; the kernel ends the process that uses more. It imports nothing of hasten, which keeps its start short.

| operation | answer |
|---|---|
| ["start", id, kind, text, tokens] | a sequence that has seen tokens: its mask |
| ["taste", kind, text] | compile, and follow a few tokens of a seeded walk, in a fork: nothing but that it went well |
| ["advance", id, token] | the next mask |
| ["rollback", id, count] | the mask of as many tokens before |
| ["fork", id, new] | a copy of a sequence under another id: its mask |
| ["drop", id] | none |
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

FOLLOWS, COMPLETE, FAILED = b"\0", b"\1", b"\2"
"""A mask follows; the grammar is complete and nothing may come; the text of an error follows."""

WALK = 16
"""Tokens that a taste follows: what a grammar costs may show only behind its first."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
"""Between the parts of JSON: bounded, for a model that repeats itself would never come to an end in an endless one."""
FREE_SECONDS = 0.03
"""After so long a taste is held up again and again: all processors compute, and what it takes is taken from a step."""
PULSE_SECONDS = 0.01
RESTS = 11
"""Pulses of rest after each one of work."""
STARVED_SECONDS = 0.05
"""A taste that has used less of the processor than this has not had its chance: the machine is busy, which is no fault of the grammar."""
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
KEPT = 32
"""Compiled grammars kept for the next request, the latest used."""


class Follower:
    """Sequences by id, and the grammars they follow."""

    def __init__(self, tokenizer: Any, words: int, has_end: bool) -> None:
        self._tokenizer, self._bytes = tokenizer, words * 4
        self._ids = (1 << tokenizer.vocab_size) - 1
        if not has_end:  # the library has guessed an end of text that the model does not know
            self._ids &= ~sum(1 << token for token in set(tokenizer.eos_tokens))
        self._compiled: dict[tuple[str, str], Any] = {}
        self._sequences: dict[int, Any] = {}

    def play(self, operation: list[Any]) -> bytes | None:
        """The answer to one operation."""
        name, *rest = operation
        if name == "start":
            sequence, kind, text, tokens = rest
            matcher = self._start(kind, text)
            if tokens:
                matcher.consume_tokens(tokens)
            self._sequences[sequence] = matcher
        elif name == "advance":
            sequence, token = rest
            matcher = self._sequences[sequence]
            matcher.consume_token(token)
        elif name == "fork":
            sequence, new = rest
            matcher = self._sequences[new] = self._sequences[sequence].deep_copy()
        elif name == "rollback":
            sequence, count = rest
            matcher = self._sequences[sequence]
            matcher.rollback(count)
        elif name == "taste":
            return self._taste(*rest)
        else:
            self._sequences.pop(rest[0], None)
            return None
        return self._standing(matcher)

    def _start(self, kind: str, text: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        compiled = self._compiled.pop((kind, text), None)
        if compiled is None:
            if kind == "json_schema":
                overrides: Any = {"whitespace_pattern": WHITESPACE, "lenient": False}
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(spelt_out(json.loads(text))), overrides=overrides)
            else:
                grammar = LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_lark(text)
            limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        self._compiled[kind, text] = compiled
        if len(self._compiled) > KEPT:
            del self._compiled[next(iter(self._compiled))]
        return compiled.deep_copy()

    def _taste(self, kind: str, text: str) -> bytes:
        matcher, state = self._start(kind, text), 1
        first = answer = self._standing(matcher)
        for _ in range(WALK):
            if answer[:1] != FOLLOWS:
                break  # a walk may end anywhere; only a grammar without a beginning is refused
            mask = int.from_bytes(answer[1:], "little")
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            skipped = state % mask.bit_length()
            beyond = mask >> skipped
            matcher.consume_token(skipped + (beyond & -beyond).bit_length() - 1)
            answer = self._standing(matcher)
        return first if first[:1] == FAILED else COMPLETE

    def _standing(self, matcher: Any) -> bytes:
        if matcher.is_error():
            return FAILED + (matcher.get_error() or "a token that the grammar does not allow").encode()
        if matcher.is_stopped():
            return COMPLETE
        mask: int = int.from_bytes(matcher.compute_bitmask(), "little") & self._ids
        if matcher.is_error():
            return FAILED + (matcher.get_error() or "no mask").encode()
        if mask:
            return FOLLOWS + (mask & (1 << self._bytes * 8) - 1).to_bytes(self._bytes, "little")
        return COMPLETE if matcher.is_accepting() else FAILED + b"no token of this vocabulary can go on"


DATA = ("const", "enum", "default", "examples")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def spelt_out(schema: Any) -> Any:
    """The same schema, with NUL added to what its patterns' negated classes exclude.

    llguidance 1.9 lets a class that excludes the quote or the backslash, [^"], pass them in their escaped form, unless it excludes a
    control character too. An output then lacks a NUL that it might have had, and is valid."""
    if isinstance(schema, list):
        return [spelt_out(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "pattern" and isinstance(value, str):
            plain[name] = without_nul(value)
        elif name in NAMED and isinstance(value, dict):
            plain[name] = {without_nul(key) if name == "patternProperties" else key: spelt_out(each) for key, each in value.items()}
        else:
            plain[name] = value if name in DATA else spelt_out(value)
    return plain


def without_nul(pattern: str) -> str:
    """A regular expression whose negated classes exclude NUL as well; one that begins with ] keeps its peculiar meaning."""
    made, inside, place = "", False, 0
    while place < len(pattern):
        piece = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        if piece == "[" and not inside and pattern[place + 1 : place + 2] == "^":
            piece = "[^" if pattern[place + 2 : place + 3] == "]" else "[^\\x00"
            place += 1 + (piece == "[^")  # past the caret, and past a ] that closes nothing
            piece += "]" if piece == "[^" else ""
            inside = True
        elif piece in "[]":
            inside = piece == "["
        made += piece
        place += len(piece) if piece[0] == "\\" else 1
    return made


def tasted(follower: Follower, operation: list[Any], settings: dict[str, Any]) -> bytes:
    """The answer to a taste, from a fork of this process that ends with it, so that none has to be started for the next one.

    What does not come at once (a large schema takes some 5 ms) is computed in pulses, a twelfth of the time, so that its neighbours
    lose no more than that, though each of their steps waits for whichever thread the pulse took the processor from."""
    source, target = os.pipe()
    child, began, body = os.fork(), time.monotonic(), b""
    if not child:
        try:
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # a parent that is killed could not end it, nor let it go on
            os.write(target, played(follower, operation, settings["compile_seconds"]) or FAILED)
        finally:
            os._exit(0)
    os.close(target)
    while (late := time.monotonic() - began) < settings["start_seconds"]:
        if late > settings["answer_seconds"] and used(child) >= STARVED_SECONDS:
            break
        if late > FREE_SECONDS:
            os.kill(child, signal.SIGSTOP)
            time.sleep(RESTS * PULSE_SECONDS)
            os.kill(child, signal.SIGCONT)
        if select.select([source], [], [], PULSE_SECONDS)[0]:
            body = os.read(source, 1 << 16)
            break
    end(child, source)
    return body or FAILED + b"it takes too much time or memory"


def end(child: int, source: int) -> None:
    """Of a fork, and of what it is heard by."""
    os.close(source)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def used(process: int) -> float:
    """Processor seconds of a process so far."""
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def played(follower: Follower, operation: list[Any], seconds: float) -> bytes | None:
    """The answer to an operation that may take so much of the processor's time; the kernel ends a process that takes more."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        body = follower.play(operation)
    except Exception as error:
        body = FAILED + f"{error}".encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return body


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    settings = json.loads(sys.argv[1])
    source, target = sys.stdin.buffer, sys.stdout.buffer

    def answer(body: bytes) -> None:
        target.write(struct.pack("<I", len(body)) + body)
        target.flush()

    try:
        from llguidance import LLTokenizer

        ends = settings["end_ids"]
        tokenizer = LLTokenizer(settings["tokenizer"], eos_token=ends or None)
    except Exception as error:
        answer(FAILED + f"{type(error).__name__}: {error}".encode())
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + settings["bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    follower = Follower(tokenizer, settings["words"], bool(ends))
    answer(COMPLETE)
    while header := source.read(4):
        for operation in json.loads(source.read(*struct.unpack("<I", header))):
            if operation[0] == "taste":
                body: bytes | None = tasted(follower, operation, settings)
            else:
                body = played(follower, operation, settings["compile_seconds" if operation[0] == "start" else "step_seconds"])
            if body is not None:
                answer(body)


if __name__ == "__main__":
    main()
