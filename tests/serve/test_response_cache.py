"""The exact response cache: nothing but the very same request is answered from it, and it stays within its bounds."""

import asyncio
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import checkpoint
from hasten.base.errors import CheckpointError, ConfigError
from hasten.engine import LLM, BeamSearch, Completion, Grammar, SamplingParams, TokenLogprob
from hasten.program import Formats
from hasten.serve.responses import (
    Answer,
    Asked,
    Limits,
    MemoryStore,
    Output,
    Played,
    ResponseCache,
    decode_answer,
    digest_in_thread,
    encode_answer,
    key_of,
    model_digest,
    must_repeat,
    open_store,
)
from hasten.serve.responses.store import ENTRY_OVERHEAD

MODEL = bytes(range(32))
LIMITS = Limits()


def answer(text: str, tokens: int = 3, logprobs: int | None = None) -> Answer:
    entries = None
    if logprobs is not None:
        entries = tuple(TokenLogprob(i, -0.1 * i, tuple((j, -1.5 * j) for j in range(logprobs))) for i in range(tokens))
    return Answer((Output(text, tuple(range(tokens)), "stop", entries),), 64, tokens)


def memory_cache(limits: Limits = LIMITS, model: bytes | None = MODEL) -> ResponseCache:
    cache = ResponseCache(MemoryStore(limits), limits.value_bytes)
    if model is not None:
        cache.open(model)
    return cache


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("code-8m", context=256, max_sequences=4)


# --- keys

BASE = SamplingParams(
    max_tokens=64, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5,
    seed=7, stop=("a", "b"), stop_token_ids=(5, 6), min_tokens=2, n=2, best_of=4, logit_bias={3: 1.0, 4: -1.0}, logprobs=2,
    prompt_logprobs=1, grammar=Grammar.regex("[ab]+"),
)  # fmt: skip
SEARCH = SamplingParams(max_tokens=64, beam=BeamSearch(width=4, length_penalty=0.5, early_stopping=True))

Change = Callable[[np.random.Generator, object], object]


def other_number(rng: np.random.Generator, value: object) -> object:
    return float(np.nextafter(value, 100.0)) if rng.random() < 0.3 else float(value) + float(rng.choice([0.001, 0.01, 0.05]))


def other_count(rng: np.random.Generator, value: object) -> object:
    return int(value) + int(rng.integers(1, 4))


def other_stops(rng: np.random.Generator, value: object) -> object:
    return [(*value, "c"), value[:-1], value[::-1], ("".join(value),), (value[0] + "\0", *value[1:])][rng.integers(5)]


def other_ids(rng: np.random.Generator, value: object) -> object:
    return [(*value, 9), value[:-1], (*value[:-1], value[-1] + 1)][rng.integers(3)]


def other_biases(rng: np.random.Generator, value: object) -> object:
    pairs = dict(value)
    return [pairs | {9: 1.0}, {3: 1.0}, pairs | {3: 1.5}, {3: -1.0, 4: 1.0}][rng.integers(4)]


CHANGES: dict[str, Change] = {
    "max_tokens": other_count, "temperature": other_number, "top_k": other_count, "top_p": other_number, "min_p": other_number,
    "repetition_penalty": other_number, "presence_penalty": other_number, "frequency_penalty": other_number, "seed": other_count,
    "stop": other_stops, "stop_token_ids": other_ids, "ignore_eos": lambda rng, value: not value, "min_tokens": other_count,
    "n": lambda rng, value: int(value) + 1, "best_of": other_count, "logit_bias": other_biases, "logprobs": other_count,
    "prompt_logprobs": other_count, "echo": lambda rng, value: not value,
    "grammar": lambda rng, value: [None, Grammar.regex("[ab]*"), Grammar.lark("[ab]+"), Grammar.json_object()][rng.integers(4)],
    "beam": lambda rng, value: None if value is not None else BeamSearch(width=2),
}  # fmt: skip


def changed(rng: np.random.Generator, params: SamplingParams, field: str) -> SamplingParams:
    value = CHANGES[field](rng, getattr(params, field))
    if field == "beam":
        return SEARCH if params.beam is None else dataclasses.replace(SEARCH, beam=None)
    without = {"grammar": None} if field == "ignore_eos" else {}
    return dataclasses.replace(params, **{field: value, **without})


@pytest.mark.row("prefix cache", "keys of typed fields")
def test_every_field_of_the_parameters_is_part_of_the_key():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(SamplingParams)}, "say how to change the new field"
    rng = np.random.default_rng(0)
    for field in CHANGES:
        params = dataclasses.replace(BASE, grammar=None) if field == "ignore_eos" else BASE
        other = changed(rng, params, field)
        differing = {one.name for one in dataclasses.fields(SamplingParams) if getattr(other, one.name) != getattr(params, one.name)}
        assert differing == {field} or field == "beam"
        assert key_of(MODEL, Asked("", (1, 2), params)) != key_of(MODEL, Asked("", (1, 2), other)), field


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SEARCH, dataclasses.replace(SEARCH, beam=dataclasses.replace(SEARCH.beam, **change)))
        for change in ({"width": 5}, {"length_penalty": 0.6}, {"early_stopping": False}, {"early_stopping": "never"})
    ]
    + [(SamplingParams(grammar=Grammar("regex", "a")), SamplingParams(grammar=Grammar("lark", "a")))],
)
def test_fields_inside_fields_are_part_of_the_key(one, other):
    nested = {field.name for kind in (BeamSearch, Grammar) for field in dataclasses.fields(kind)}
    assert nested == {"width", "length_penalty", "early_stopping", "kind", "text"}, "change the new field here"
    assert key_of(MODEL, Asked("", (1,), one)) != key_of(MODEL, Asked("", (1,), other))


def test_a_field_that_parameters_gain_is_part_of_the_key_by_itself():
    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Later(SamplingParams):
        new: int = 0

    assert key_of(MODEL, Asked("", (1,), Later(new=1))) != key_of(MODEL, Asked("", (1,), Later(new=2)))
    assert key_of(MODEL, Asked("", (1,), Later())) != key_of(MODEL, Asked("", (1,), SamplingParams()))


@pytest.mark.row("prefix cache", "keys of typed fields")
def test_fields_do_not_run_into_each_other():
    params = SamplingParams()
    asked = [Asked("a", (1, 2), params), Asked("", (97, 1, 2), params), Asked("a\0", (1, 2), params), Asked("a", (1,), params)]
    asked += [Asked("a", (1, 2, 0), params), Asked("a", (0, 1, 2), params), Asked("a", (1 + (2 << 32),), params), Asked("a", (), params)]
    asked += [Asked("a", (1, 2), dataclasses.replace(params, stop=stop)) for stop in (("ab",), ("a", "b"), ("b", "a"))]
    keys = {key_of(model, one) for one in asked for model in (MODEL, MODEL[:-1], MODEL + b"\0")}
    assert len(keys) == 3 * len(asked)


def test_no_wrong_hit_in_ten_thousand_near_misses():
    rng = np.random.default_rng(5)
    cache = memory_cache()
    stored: dict[tuple[bytes, Asked], str] = {}

    def drawn() -> Asked:
        params = BASE if rng.random() < 0.8 else SEARCH
        params = dataclasses.replace(params, max_tokens=int(rng.integers(10, 200)))
        return Asked(f"tenant-{rng.integers(4)}", tuple(rng.integers(0, 32000, rng.integers(1, 100)).tolist()), params)

    def near(model: bytes, asked: Asked, kind: int) -> tuple[bytes, Asked]:
        match kind:
            case 0:
                tokens, at = list(asked.prompt), int(rng.integers(len(asked.prompt)))
                match rng.integers(4):
                    case 0:
                        tokens[at] ^= 1 << int(rng.integers(15))
                    case 1:
                        tokens.insert(at, int(rng.integers(32000)))
                    case 2:
                        del tokens[at]
                    case 3:
                        tokens[at], tokens[0] = tokens[0], tokens[at]
                return model, dataclasses.replace(asked, prompt=tuple(tokens))
            case 1:
                field = str(rng.choice(list(CHANGES)))
                params = asked.params
                if params.beam is not None:
                    field = str(rng.choice(["max_tokens", "seed", "ignore_eos", "echo", "beam"]))
                    params = dataclasses.replace(params, seed=3)
                if field == "ignore_eos":
                    params = dataclasses.replace(params, grammar=None)
                return model, dataclasses.replace(asked, params=changed(rng, params, field))
            case 2:
                tenant = [asked.tenant + "0", asked.tenant[:-1], "", asked.tenant.upper(), f"tenant-{rng.integers(4)}"][rng.integers(5)]
                return model, dataclasses.replace(asked, tenant=tenant)
        flipped = bytearray(model)
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
        return bytes(flipped), asked

    async def run() -> tuple[int, int]:
        population = [drawn() for _ in range(200)]
        for asked in population:
            stored[MODEL, asked] = f"answer {len(stored)}"
            await cache.put(asked, answer(stored[MODEL, asked]))
        wrong = right = 0
        for turn in range(10_000):
            model, asked = near(MODEL, population[rng.integers(len(population))], turn % 4)
            cache.open(model)
            found = await cache.get(asked)
            if found is not None:
                right += found.answer.outputs[0].text == stored.get((model, asked))
                wrong += found.answer.outputs[0].text != stored.get((model, asked))
            cache.open(MODEL)
            if turn % 10 == 0:  # what is there is found all the while
                known = population[rng.integers(len(population))]
                found = await cache.get(known)
                assert found is not None
                assert found.answer.outputs[0].text == stored[MODEL, known]
        return wrong, right

    wrong, right = asyncio.run(run())
    assert wrong == 0
    assert right < 400  # a few changes undo themselves, or lead to another request that is there
    assert cache.counts()["damaged"] == 0


# --- what may be answered from it


@pytest.mark.parametrize(
    ("params", "repeats"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=1.0), False),
        (SamplingParams(temperature=1.0, seed=3), True),
        (SamplingParams(n=2, temperature=0.5), False),
        (SEARCH, True),
    ],
)
def test_only_what_must_repeat_is_kept(params, repeats):
    cache, asked = memory_cache(), Asked("t", (1, 2, 3), params)

    async def run() -> object:
        await cache.put(asked, answer("x"))
        return await cache.get(asked)

    assert must_repeat(params) is repeats
    assert (asyncio.run(run()) is not None) is repeats
    assert cache.counts()["kept"] == repeats


def test_it_is_closed_until_the_model_is_known():
    cache, asked = memory_cache(model=None), Asked("t", (1, 2, 3), SamplingParams())

    async def run() -> None:
        await cache.put(asked, answer("x"))
        assert await cache.get(asked) is None
        cache.open(MODEL)
        assert await cache.get(asked) is None  # what came before was not kept
        await cache.put(asked, answer("y"))
        hit = await cache.get(asked)
        assert hit is not None
        assert (hit.kind, hit.header, hit.answer) == ("exact", "exact", answer("y"))
        await cache.close()
        assert await cache.get(asked) is None

    asyncio.run(run())


def test_answers_come_back_as_they_were():
    done = [
        Completion((1, 2), (3, 4), "é\n\0", "stop", 0, (TokenLogprob(3, -0.1, ((3, -0.1), (7, -float("inf")))),), None),
        Completion((1, 2), (), "", "length", 1, (), None),
    ]
    kept = Answer.of(done, generated_tokens=9)
    key = bytes(32)
    back = decode_answer(key, encode_answer(key, kept))
    assert back == kept
    assert back.completions((1, 2)) == done
    assert (back.prompt_tokens, back.generated_tokens) == (2, 9)


def test_an_answer_with_an_error_is_none():
    failed = Completion((1,), (), "", "error", 0, error="no")
    assert Answer.of([Completion((1,), (2,), "a", "stop"), failed]) is None
    assert Answer.of([]) is None


def test_damaged_and_foreign_bytes_are_misses():
    key, other = bytes(32), bytes([1]) * 32
    value = encode_answer(key, answer("text", 5, 2))
    assert decode_answer(key, value) is not None
    assert decode_answer(other, value) is None, "another request's"
    rng = np.random.default_rng(1)
    for at in range(len(value)):
        damaged = bytearray(value)
        damaged[at] ^= 1 << int(rng.integers(8))
        assert decode_answer(key, bytes(damaged)) is None, at
        assert decode_answer(key, value[:at]) is None, at
    assert decode_answer(key, value + b"\0") is None
    # right digest, other contents: another program's, or another version's
    for packed in (b"", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([[["x"]], 1, 2]), b"\x91" * 100_000):
        import hashlib

        forged = value[:1] + hashlib.blake2b(packed, digest_size=16, key=key).digest() + packed
        assert decode_answer(key, forged) is None

    class Damaging(MemoryStore):
        async def get(self, key: bytes) -> bytes | None:
            found = await super().get(key)
            return None if found is None else found[:-1]

    cache = ResponseCache(Damaging(LIMITS), LIMITS.value_bytes)
    cache.open(MODEL)
    asked = Asked("t", (1,), SamplingParams())

    async def run() -> object:
        await cache.put(asked, answer("x"))
        return await cache.get(asked)

    assert asyncio.run(run()) is None
    assert cache.counts() | {"damaged": 1, "misses": 1, "hits": 0} == cache.counts()


def test_an_answer_that_is_too_long_is_not_kept():
    cache, asked = memory_cache(Limits(value_bytes=1000)), Asked("t", (1,), SamplingParams())

    async def run() -> object:
        await cache.put(asked, answer("x" * 2000))
        return await cache.get(asked)

    assert asyncio.run(run()) is None
    assert cache.counts()["too_large"] == 1
    assert cache.counts()["store_entries"] == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=2, best_of=3, logprobs=2, prompt_logprobs=1, echo=True),
        SamplingParams(max_tokens=12, stop=("\n",), min_tokens=2, logit_bias={198: -5.0}),
        SamplingParams(max_tokens=8, grammar=Grammar.regex("[a-z]{1,6}")),
        SamplingParams(max_tokens=8, n=2, beam=BeamSearch(width=3)),
    ],
    ids=["greedy", "seeded", "stopped", "grammar", "beams"],
)
def test_a_hit_is_what_the_engine_would_say_again(llm, params):
    asked, cache = Asked("t", tuple(llm.encode("def add(a, b):\n    ")), params), memory_cache()
    done = llm.generate([list(asked.prompt)], params)

    async def run() -> list[Completion]:
        await cache.put(asked, Answer.of(done))
        hit = await cache.get(asked)
        assert hit is not None
        return hit.answer.completions(asked.prompt)

    again = llm.generate([list(asked.prompt)], params)
    assert asyncio.run(run()) == done == again
    assert len(done) == params.n


# --- bounds


class Naive:
    """The same store in a list, looked through from end to end."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.rows = limits, []  # [key, put at, value], the one used last comes last

    def get(self, key: bytes, now: float) -> bytes | None:
        for row in self.rows:
            if row[0] == key:
                self.rows.remove(row)
                if now - row[1] < self.limits.seconds:
                    self.rows.append(row)
                    return row[2]
        return None

    def put(self, key: bytes, value: bytes, now: float) -> None:
        self.rows = [row for row in self.rows if row[0] != key]
        if len(value) > self.limits.value_bytes or len(value) + ENTRY_OVERHEAD > self.limits.bytes:
            return
        self.rows.append([key, now, value])
        while self.bytes > self.limits.bytes:
            del self.rows[0]

    @property
    def bytes(self) -> int:
        return sum(len(row[2]) + ENTRY_OVERHEAD for row in self.rows)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["get", "put", "wait"]), st.integers(0, 11), st.integers(0, 1200), st.sampled_from([0.0, 1.0, 3.0, 9.5])),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(500, 6000))
def test_memory_stays_within_its_bounds_and_keeps_what_was_used_last(operations, most):
    limits, now = Limits(most, 1000, 10.0), [0.0]
    store, naive = MemoryStore(limits, lambda: now[0]), Naive(limits)

    async def run() -> None:
        for what, name, size, wait in operations:
            key, value = bytes([name]) * 32, bytes([size % 251]) * size
            if what == "get":
                assert await store.get(key) == naive.get(key, now[0])
            elif what == "put":
                kept = await store.put(key, value)
                naive.put(key, value, now[0])
                assert kept == any(row[0] == key for row in naive.rows)
            else:
                now[0] += wait
            counts = store.counts()
            assert counts["bytes"] <= most
            assert (counts["entries"], counts["bytes"]) == (len(naive.rows), naive.bytes)

    asyncio.run(run())


def test_what_is_old_is_gone_however_often_it_was_read():
    now = [0.0]
    store = MemoryStore(Limits(seconds=10.0), lambda: now[0])

    async def run() -> list[bool]:
        await store.put(b"k", b"v")
        found = []
        for _ in range(4):
            found.append(await store.get(b"k") is not None)
            now[0] += 4.0
        return found

    assert asyncio.run(run()) == [True, True, True, False]
    assert store.counts() == {"entries": 0, "bytes": 0, "evicted": 0, "expired": 1}


def test_python_takes_no_more_than_is_counted():
    import tracemalloc

    store, size = MemoryStore(Limits()), 100

    async def run() -> None:
        for number in range(5000):
            await store.put(number.to_bytes(32, "big"), bytes(size) + number.to_bytes(4, "big"))

    tracemalloc.start()
    asyncio.run(run())
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1.1 * store.counts()["bytes"]


@pytest.mark.parametrize("field", ["bytes", "value_bytes", "seconds"])
def test_limits_are_above_nothing(field):
    with pytest.raises(ConfigError, match=field):
        Limits(**{field: 0})


@pytest.mark.parametrize("where", ["", "disk", "http://localhost", "redis:localhost", "redis://localhost:port", "memory://x"])
def test_what_is_no_store_is_refused(where):
    with pytest.raises(ConfigError, match="response cache"):
        open_store(where, LIMITS)


def test_a_password_is_not_told():
    with pytest.raises(ConfigError) as told:
        open_store("reddis://user:hush@host", LIMITS)
    assert "hush" not in str(told.value)


# --- time


@pytest.mark.timed
@pytest.mark.parametrize(("prompt", "tokens", "logprobs"), [(64, 64, None), (2000, 500, 5)])
def test_a_hit_is_quick(prompt, tokens, logprobs):
    cache = memory_cache()
    asked = Asked("tenant", tuple(range(prompt)), dataclasses.replace(BASE, logprobs=logprobs))

    async def run() -> list[float]:
        await cache.put(asked, answer("word " * tokens, tokens, logprobs))
        times = []
        for _ in range(101):
            began = time.perf_counter()
            assert await cache.get(asked) is not None
            times.append(time.perf_counter() - began)
        return times

    assert statistics.median(asyncio.run(run())) < 2e-3


# --- the model's digest


@pytest.fixture
def directory(tmp_path) -> Path:
    """A bundled model's directory, a copy."""
    return Path(shutil.copytree(checkpoint.locate.bundled_directory("code-8m"), tmp_path / "model"))


def played(**changes) -> Played:
    return msgspec.structs.replace(Played.here("cpu", Formats("int8"), 512), **changes)


def test_any_byte_of_a_model_changes_its_digest(directory):
    rng, seen = np.random.default_rng(3), set()
    seen.add(model_digest(checkpoint.load(directory), played()))
    assert seen == {model_digest(checkpoint.load(directory), played())}
    weights = directory / "model.safetensors"
    size = weights.stat().st_size
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    for at in [header, size - 1, *rng.integers(header, size, 20).tolist()]:
        with weights.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
        seen.add(model_digest(checkpoint.load(directory), played()))
    assert len(seen) == 23
    for name, old, new in [
        ("tokenizer.json", b'"version"', b'"version" '),
        ("generation_config.json", b'"eos_token_id"', b'"eos_token_id_"'),
        ("config.json", b'"rope_theta": ', b'"rope_theta": 1'),
    ]:
        text = (directory / name).read_bytes()
        assert old in text, name
        (directory / name).write_bytes(text.replace(old, new, 1))
        try:
            seen.add(model_digest(checkpoint.load(directory), played()))
        finally:
            (directory / name).write_bytes(text)
    assert len(seen) == 26


def test_how_a_model_is_played_changes_its_digest(directory):
    model = checkpoint.load(directory)
    changes = [{}, {"backend": "reference"}, {"context": 511}, {"isa": "other"}, {"adapter": "a"}, {"exits": "a"}]
    changes += [{"formats": formats} for formats in (Formats(), Formats("int4"), Formats("int8", "bf16"), Formats("int8", None, "int8"))]
    assert {key for change in changes for key in change} == set(Played.__struct_fields__), "change the new field here"
    assert len({model_digest(model, played(**change)) for change in changes}) == len(changes)


def test_random_and_changed_weights_have_digests():
    one, same, other = (checkpoint.load(name) for name in ("random:gpt2", "random:GPT2", "random:gpt2@2:4"))
    assert model_digest(one, played()) == model_digest(same, played()) != model_digest(other, played())


def test_weights_in_memory_are_read(directory):
    from hasten.formats.weights import Weights

    model = checkpoint.load(directory)
    plain = {name: model.weights[name] for name in model.weights}
    first = next(iter(plain))

    def digest(change: bool) -> bytes:
        weight = plain[first]
        array = np.array(weight.load())
        if change:
            array.reshape(-1).view(np.uint16)[-1] ^= 1
        weights = Weights({**plain, first: dataclasses.replace(weight, load=lambda: array)})
        return model_digest(dataclasses.replace(model, weights=weights), played())

    assert digest(False) == digest(False) != digest(True)


def test_a_file_changed_since_it_was_loaded_has_no_digest(directory):
    model = checkpoint.load(directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(CheckpointError, match="was changed"):
        model_digest(model, played())
    with pytest.raises(CheckpointError, match="was changed"):
        asyncio.run(digest_in_thread(model, played()))


@pytest.mark.timed
def test_the_digest_is_taken_in_the_background(directory):
    model = checkpoint.load(directory)
    assert asyncio.run(digest_in_thread(model, played())) == model_digest(model, played())

    async def cancelled() -> float:
        task = asyncio.create_task(digest_in_thread(model, played()))
        await asyncio.sleep(0)
        task.cancel()
        began = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - began

    assert asyncio.run(cancelled()) < 1
