"""What was mended on one route of other servers and left open on its twin: each such thing asked of every route that it could concern."""

import asyncio
import itertools
import threading
import time
from pathlib import Path

import httpx
import pytest

from hasten.checkpoint import bundled_directory
from hasten.engine import Grammar, SamplingParams
from hasten.engine.constraint import ConstraintLimits, Constraints
from hasten.engine.grammar_worker import KEPT, Follower
from hasten.model.tokenizer import Tokenizer
from hasten.serve.admission import Admission
from hasten.serve.errors import ApiError
from hasten.serve.log import Log, Note
from hasten.serve.service import Service
from hasten.serve.texts import Texts
from tests.serve.test_boundaries import CHAT, GOOD, told

# --- grammars

NEVER = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?!x)[a-z]+("}}, "required": ["a"]}
CROSSED = " & ".join(f"/(.{{{count}}})*/" for count in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))
COSTLY = {"a grammar": f'start: "a" X\nX: {CROSSED}', "a schema": {"type": "integer", "multipleOf": 1_000_003}}
"""What would take the library minutes."""
BAD_SCHEMAS = {
    "no schema": {"type": "nonsense"}, "a pattern that is none": NEVER, "deep": None, "an endless reference": {"$ref": "#"},
    "nothing fits": {"enum": []}, "a reference elsewhere": {"$ref": "http://127.0.0.1:9/x.json"}, "a file": {"$ref": "file:///etc/passwd"},
    "never": False,
}  # fmt: skip
BAD_TEXTS = {
    "regex": ["(", "(" * 30_000 + ")" * 30_000, "[", "a{5,2}", "(?=a)b", "\\1", "x{99999999}", "(x{999}){999}", "*"],
    "grammar": ["start: nowhere", "start: %what", "start: (" * 5000, "nothing", 'start: "a"~99999999999'],
}
WAYS = {
    "/v1/completions": lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
    "/v1/chat/completions": lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
    "/v1/responses": lambda schema: {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    "/v1/messages": lambda schema: {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
}
TOOLS = {
    "/v1/chat/completions": lambda schema: {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "tool_choice": "required",
    },
    "/v1/responses": lambda schema: {"tools": [{"type": "function", "name": "f", "parameters": schema}], "tool_choice": "required"},
    "/v1/messages": lambda schema: {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
}


def deep(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels):
        schema = {"allOf": [schema]}
    return schema


def hostile(path: str, stream: bool):
    """What is asked, and the field to be named."""
    for name, schema in BAD_SCHEMAS.items():
        schema = deep(400) if name == "deep" else schema
        for ways in (WAYS, TOOLS):
            if path in ways and (ways is WAYS or isinstance(schema, dict)):
                if path == "/v1/messages" and not isinstance(schema, dict):
                    continue
                more = ways[path](schema if ways is WAYS or path != "/v1/messages" else {"type": "object", **schema})
                yield name, more, next(iter(more))
    if path in {"/v1/completions", "/v1/chat/completions"}:
        for field, texts in BAD_TEXTS.items():
            for text in texts:
                yield text[:20], {field: text}, field
        if not stream:
            yield "costly", {"grammar": COSTLY["a grammar"]}, "grammar"
    if not stream:
        yield "costly", (more := WAYS[path](COSTLY["a schema"])), next(iter(more))


@pytest.mark.timed
@pytest.mark.row("regex and grammars", "refused in time on every route")
@pytest.mark.row("failing open", "no grammar, no answer")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", WAYS)
def test_a_grammar_that_is_none_is_refused_in_time_by_name(path, stream, server):
    """Never answered as if nothing had been asked."""
    wrong = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name, more, field in hostile(path, stream):
            if path == "/v1/messages" and more.get("tool_choice") and more["tools"][0]["input_schema"].get("type") != "object":
                continue  # which the body refuses for another reason
            for _ in range(2):
                began = time.monotonic()
                answer = client.post(
                    path,
                    json={**GOOD[path], **more, "max_tokens" if path != "/v1/responses" else "max_output_tokens": 30, "stream": stream},
                )
                late = time.monotonic() - began
                if late < 2:  # the machine may have been busy otherwise
                    break
            if stream and answer.status_code == 200:  # it can be followed for a few tokens, and for no more
                last = answer.text.rstrip().rpartition("\n\n")[2]
                if late < 2 and "cannot be followed" in last:
                    continue
            if late >= 2 or answer.status_code != 400 or field not in told(answer):
                wrong.append((name, field, late, answer.status_code, answer.text[-300:]))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.row("regex and grammars", "caches are bounded")
def test_grammars_that_are_remembered_are_bounded():
    made = Constraints(bundled_directory("code-8m") / "tokenizer.json", 8192, [0], ConstraintLimits(known=3))
    for number in range(6):
        state = made.start(Grammar.regex(f"[ab]{{{number + 1}}}"))
        assert made.wait(20, [state])
        assert state.error is None
        state.close()
    assert [one.text for one in made._known] == ["[ab]{4}", "[ab]{5}", "[ab]{6}"]
    again = made.start(Grammar.regex("[ab]{4}"))
    assert made.wait(20, [again])
    assert [one.text for one in made._known] == ["[ab]{5}", "[ab]{6}", "[ab]{4}"]
    made.close()


@pytest.mark.row("regex and grammars", "caches are bounded")
def test_compiled_grammars_are_bounded():
    from llguidance import LLTokenizer

    follower = Follower(LLTokenizer(str(bundled_directory("code-8m") / "tokenizer.json"), eos_token=[0]), 256, True)
    for number in range(KEPT + 9):
        follower.play(["start", number, "regex", f"[ab]{{{number + 1}}}", []])
        follower.play(["drop", number])
    assert len(follower._compiled) == KEPT
    assert not follower._sequences


# --- what is done before a request is known to be wanted


@pytest.mark.row("overload", "counted before it is read")
def test_who_is_one_too_many_is_not_tokenized():
    async def go() -> None:
        log, read = Log(as_json=False), []
        admission = Admission(2, 2)

        class Ready:
            able, state, retry_s = True, "ready", 1

            def submit(self, *arguments) -> int:
                raise AssertionError("it was handed in")

        service = Service("m", Ready(), None, admission, log, deadline_s=None)

        async def encode() -> list[list[int]]:
            read.append(1)
            return [[1]]

        assert admission.take(2)
        note = Note("1", "POST", "/", 0.0)
        for generation in (
            lambda: service.generation(encode, 1, SamplingParams(), "", note, None, None), lambda: service.computed(encode, 1, None,
            lambda prompts: None)
        ):  # fmt: skip
            with pytest.raises(ApiError) as refused:
                async with generation():
                    pass
            assert (refused.value.status, refused.value.retry_s) == (429, 1)
        assert not read
        assert admission.taken == 2
        log.close()

    asyncio.run(go())


@pytest.mark.row("borrowed tokenizer", "one a thread")
def test_every_thread_has_a_tokenizer_of_its_own(monkeypatch):
    users: dict[int, set[int]] = {}
    inside: dict[int, int] = {}
    most = [0]
    for name in ("encode", "decode"):
        real = getattr(Tokenizer, name)

        def watched(self, *arguments, real=real, **named):
            users.setdefault(id(self), set()).add(threading.get_ident())
            inside[id(self)] = inside.get(id(self), 0) + 1
            assert inside[id(self)] == 1, "two at a time"
            most[0] = max(most[0], sum(inside.values()))
            try:
                return real(self, *arguments, **named)
            finally:
                inside[id(self)] -= 1

        monkeypatch.setattr(Tokenizer, name, watched)

    async def go(texts: Texts) -> list:
        long = "def f(x):\n    return x\n" * 60
        return await asyncio.gather(
            *(texts.prompts([f"{long}{number}"], SamplingParams()) for number in range(60)),
            *(texts.chat(CHAT, None, True) for _ in range(60)), *(texts.encode(f"é{number}", True) for number in range(60)),
            *(texts.decode([number + 1] * 50, True) for number in range(60)),
        )  # fmt: skip

    texts = Texts("code-8m", context=None, slots=4)
    texts.warm()
    found = asyncio.run(go(texts))
    assert len(found) == 240
    together = threading.Barrier(4)

    def reads() -> None:
        together.wait(10)
        for token in range(1, 400):
            texts.tokens.text(token)

    threads = [threading.Thread(target=reads) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    shared = id(texts.tokens._tokenizer)
    assert len(users) == 3  # two threads', and one behind a lock
    assert all(len(threads_of) == 1 for tokenizer, threads_of in users.items() if tokenizer != shared)
    assert len(set(itertools.chain(*users.values()))) >= 3
    texts.close()


@pytest.mark.timed
@pytest.mark.row("lying health", "under a burst")
def test_readiness_is_answered_under_a_burst(server):
    async def burst() -> list[float]:
        late = []
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            body = {"prompt": "def f(", "max_tokens": 8}
            asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(150)]
            while not all(one.done() for one in asked):
                began = time.monotonic()
                for path in ("/ready", "/health"):
                    assert (await client.get(path)).status_code == 200
                late.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
            assert {one.result().status_code for one in asked} <= {200, 429}
            assert any(one.result().status_code == 200 for one in asked)
        return late

    late = asyncio.run(burst())
    assert max(late) < 5  # both, on the one loop that sends the burst as well


# --- growth


def resident(pid: int) -> int:
    """Bytes that are a process's own: without files it has mapped."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def grown(samples: list[int]) -> float:
    """Bytes a window, over the later two thirds: the median of what each pair of windows says (Theil 1950, Sen 1968)."""
    later = list(enumerate(samples))[len(samples) // 3 :]
    slopes = sorted((b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(later, 2))
    return slopes[len(slopes) // 2]


WINDOW, MOST = 72, 96 * 1024
"""Requests of a window, and bytes by which it may make the two processes grow: 1,400 a request would be found."""


@pytest.mark.row("growing memory", "slope over requests")
def test_memory_does_not_grow_with_requests(server):
    chance = itertools.count()
    pids, samples = (server.process.pid, server.engine_pid()), []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(12):
            for _ in range(WINDOW // 6):
                number = next(chance)
                for path, body in GOOD.items():
                    if path in {"/v1/responses", "/v1/messages"}:
                        continue
                    answer = client.post(path, json=body)
                    assert answer.status_code == 200, number
            samples.append(sum(map(resident, pids)))
    assert grown(samples) <= MOST, samples


def test_a_planted_leak_is_found():
    flat = [10**8 + step * 30_000 % 90_000 for step in range(15)]
    assert abs(grown(flat)) < MOST
    assert grown([size + 2000 * WINDOW * place for place, size in enumerate(flat)]) > MOST
