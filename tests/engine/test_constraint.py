"""Grammars: every output is what was asked, a hostile grammar fails its own request, and what else is followed goes on."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import transformers

from hasten import LLM, SamplingParams
from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import bundled_directory
from hasten.engine.constraint import ConstraintLimits, Constraints
from hasten.engine.grammar import MAX_BYTES, MAX_DEPTH, Grammar
from hasten.engine.grammar_worker import spelt_out, without_nul
from tests.engine.schemas import schemas

DIRECTORY = bundled_directory("code-8m")
VOCAB, END = 8192, 0


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny random model with a real tokenizer: it wants nothing, so that what comes out is the grammar's doing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096, eos_token_id=END, bos_token_id=END,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("random")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DIRECTORY / name, path / name)
    return LLM(path, max_sequences=32)


@pytest.fixture
def constraints():
    made = Constraints(DIRECTORY / "tokenizer.json", VOCAB, [END])
    yield made
    made.close()


def ids_of(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def follow(constraints, state, rng, most=200):
    """Random tokens until the end; what was drawn."""
    tokens = []
    while constraints.wait(10, [state]) and state.error is None and not state.complete and len(tokens) < most:
        token = int(rng.choice(ids_of(state.mask)))
        if token == END:
            break
        tokens.append(token)
        state.advance(token)
    return tokens


def drawing(seed, **fields):
    return SamplingParams(temperature=1.0, seed=seed, **fields)


# --- outputs


def test_every_output_of_500_schemas_is_valid(engine):
    every = list(schemas(500))
    sizes = [len(json.dumps(schema)) for schema in every]
    assert np.mean(sizes[-50:]) > 10 * np.mean(sizes[:50])
    params = [drawing(seed, max_tokens=3000, grammar=Grammar.json_schema(schema)) for seed, schema in enumerate(every)]
    done = engine.generate([[1]] * len(every), params)
    for schema, one in zip(every, done):
        assert one.finish_reason == "stop", (one.finish_reason, one.error, schema, one.text[-200:])
        jsonschema.Draft202012Validator(schema).validate(json.loads(one.text))
    assert len({one.text for one in done}) > 350


@pytest.mark.parametrize(
    "pattern", ['^[^"]{1,4}$', r"^[^\\]{1,4}$", r'^[^"\\]{1,4}$', r"^[^\x22n]{1,4}$", "^[^a]{1,4}$", "^.{1,4}$", '^["a]{1,4}$']
)
def test_strings_match_their_pattern_once_they_are_read(engine, pattern):
    """Escapes are JSON's, not the pattern's."""
    schema = {
        "type": "object",
        "properties": {'q"\\': {"type": "string", "pattern": pattern}},
        "required": ['q"\\'],
        "additionalProperties": False,
    }
    grammar = Grammar.json_schema(schema)
    for one in engine.generate([[1]] * 40, [drawing(seed, max_tokens=400, grammar=grammar) for seed in range(40)]):
        assert one.finish_reason == "stop"
        jsonschema.validate(json.loads(one.text), schema)


REGEXES = [
    "[a-z]{3,8}-[0-9]{2}", "(yes|no)", "a?b?c?d", r"\d{3}-\d{4}", "(ab|cd)*e", "[^x]{5}", "größe|日本語|👍{2}", "[é-ü]{2,9}@x",
]  # fmt: skip


def test_every_output_of_a_regex_matches_it_whole(engine):
    params = [drawing(seed, max_tokens=200, grammar=Grammar.regex(pattern)) for pattern in REGEXES for seed in range(6)]
    for params_, one in zip(params, engine.generate([[1]] * len(params), params)):
        assert one.finish_reason == "stop", (params_.grammar, one)
        assert re.fullmatch(params_.grammar.text, one.text), (params_.grammar, one.text)


def test_a_lark_grammar(engine):
    grammar = Grammar.lark('start: sum\nsum: NUMBER ("+" NUMBER){1,4}\nNUMBER: /[0-9]{1,3}/')
    for one in engine.generate([[1]] * 8, [drawing(seed, max_tokens=100, grammar=grammar) for seed in range(8)]):
        assert one.finish_reason == "stop"
        assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3}){1,4}", one.text)


def test_a_grammar_does_not_depend_on_the_batch(engine):
    params = [drawing(seed, max_tokens=80, grammar=Grammar.regex(pattern)) for seed, pattern in enumerate(REGEXES)]
    plain = [drawing(100 + seed, max_tokens=15) for seed in range(len(params))]
    together = engine.generate([[1]] * 2 * len(params), [one for pair in zip(params, plain) for one in pair])
    for index, one in enumerate(params):
        assert engine.generate([[1]], one) == [together[2 * index]]
    for index, one in enumerate(plain):
        assert engine.generate([[1]], one) == [together[2 * index + 1]]


def test_choices_of_one_grammar_differ_and_repeat(engine):
    params = drawing(3, n=4, max_tokens=80, grammar=Grammar.regex("[a-z]{10}"))
    done = engine.generate([[1]], params)
    assert len({one.text for one in done}) == 4
    assert done == engine.generate([[1]], params)


def test_the_end_comes_where_nothing_else_may_whatever_was_asked(engine):
    (one,) = engine.generate([[1]], drawing(0, max_tokens=30, min_tokens=30, grammar=Grammar.regex("abc")))
    assert (one.text, one.finish_reason) == ("abc", "stop")
    (long,) = engine.generate([[1]], drawing(0, max_tokens=30, min_tokens=12, grammar=Grammar.regex("(abc)*")))
    assert len(long.token_ids) >= 12
    (cut,) = engine.generate([[1]], drawing(0, max_tokens=2, grammar=Grammar.regex("[a-z]{50,60}")))
    assert cut.finish_reason == "length"
    (biased,) = engine.generate([[1]], drawing(0, max_tokens=30, grammar=Grammar.regex("abc"), logit_bias={300: 100}))
    assert biased.text == "abc"


# --- what is refused and what is hostile

REFUSED = {
    "unclosed": Grammar.regex("(a"),
    "look-ahead": Grammar.regex("(?=a)b"),
    "backreference": Grammar.regex(r"(a)\1"),
    "30,000 parentheses": Grammar.regex("(" * 30_000 + "a" + ")" * 30_000),
    "60,000 brackets": Grammar.lark("start: " + "[" * 60_000 + '"a"' + "]" * 60_000),
    "unknown rule": Grammar.lark("start: nowhere"),
    "no lark": Grammar.lark("}{"),
    "contains": Grammar.json_schema({"type": "array", "contains": {"type": "integer"}}),
    "lenient all the same": Grammar.json_schema({"type": "array", "contains": {"type": "integer"}, "x-guidance": {"lenient": True}}),
    "remote": Grammar.json_schema({"$ref": "http://127.0.0.1:9/schema.json"}),
    "circular": Grammar.json_schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"}),
    "no type": Grammar.json_schema({"type": "nothing"}),
    "nothing possible": Grammar.json_schema(False),
}
COUNTS = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
CROSSED = " & ".join(f"/(.{{{count}}})*/" for count in COUNTS)
HOSTILE = {
    "crossed patterns": Grammar.lark(f"start: X\nX: {CROSSED}"),
    "crossed behind a harmless beginning": Grammar.lark(f'start: "hello" X\nX: {CROSSED}'),
    "allOf": Grammar.json_schema({"allOf": [{"type": "string", "pattern": f"a.{{{count},}}b"} for count in range(1, 60)]}),
    "multipleOf": Grammar.json_schema({"type": "integer", "multipleOf": 1_000_003}),
    "many properties": Grammar.json_schema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(4000)}}),
}
CATASTROPHES = ["(a+)+b", "(a|a)*b", "(a|aa)+c", "(.*)*x", "(x+x+)+y", "(a|b)*a(a|b){50}", "((a{0,100}){0,100}){0,100}", r"\p{L}{1,5000}"]


def of_forks(taster):
    """Processor seconds of all its forks that have ended."""
    fields = Path(f"/proc/{taster._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timed
@pytest.mark.row("failing open", "no grammar, no answer")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compile_fails_its_request_and_never_runs_free(engine, name):
    engine.engine()
    began, taster = time.monotonic(), engine._constraints._taster
    engine.generate([[1]], drawing(0, max_tokens=1, grammar=Grammar.regex("[a-z]+")))  # its process is there
    process, before = taster._process, of_forks(taster)
    (bad, good) = engine.generate([[1], [1]], [drawing(0, max_tokens=5, grammar=REFUSED[name]), drawing(0, max_tokens=5)])
    assert time.monotonic() - began < 20  # in idle time of a busy suite; of the processor's it takes
    assert taster._process is process
    assert 0 < of_forks(taster) - before + 0.01 < 1.2
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", (), "")
    assert "\n" not in bad.error
    assert len(bad.error) < 500
    assert len(good.token_ids) == 5


@pytest.mark.timed
@pytest.mark.row("regex and grammars", "compiled apart, with a deadline")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_fails_alone(constraints, name):
    harmless = Grammar.regex("[a-z]{300}")
    beside = constraints.start(harmless)
    assert constraints.wait(10)
    began, taster = time.monotonic(), constraints._taster._process
    hostile = constraints.start(HOSTILE[name])
    longest = 0.0
    while not hostile.ready:
        before = time.monotonic()
        beside.advance(int(ids_of(beside.mask)[0]))
        assert constraints.wait(2, [beside])
        assert beside.error is None
        longest = max(longest, time.monotonic() - before)
        if len(beside._tokens) > 40:
            beside.rollback(30)
            assert constraints.wait(2, [beside])
    assert time.monotonic() - began < 20  # beside a busy suite; benchmarks/hostile_grammar.py has the two seconds
    assert " is refused: " in hostile.error
    assert hostile.mask is None
    assert longest < 1.5
    assert constraints._taster._process is taster
    again = constraints.start(harmless)
    assert constraints.wait(10, [again, beside])
    assert again.error is None
    assert beside.error is None


@pytest.mark.timed
@pytest.mark.row("regex and grammars", "compiled apart, with a deadline")
@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_patterns_that_hang_backtracking_matchers_are_harmless(constraints, pattern):
    began = time.monotonic()
    state = constraints.start(Grammar.regex(pattern))
    assert constraints.wait(2, [state])
    tokens = follow(constraints, state, np.random.default_rng(0), most=30)
    assert time.monotonic() - began < 3
    assert state.error is None or "cannot be followed" in state.error
    assert tokens


@pytest.mark.row("regex and grammars", "compiled apart, with a deadline")
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_hangs_or_crashes_its_process_later_fails_alone(fault):
    """The library's own limits have let no grammar through that does, so the fault is planted: while one sequence's token is read."""
    made = Constraints(DIRECTORY / "tokenizer.json", VOCAB, [END], ConstraintLimits(answer_seconds=1.0))
    rng = np.random.default_rng(0)
    every = [made.start(Grammar.regex("[a-z]{20,30}[0-9]{5}")) for _ in range(4)]
    for state in every:
        follow(made, state, rng, most=4)
    assert made.wait(10)
    before = [state.mask.copy() for state in every]
    process = made._follower._process
    process.send_signal(signal.SIGSTOP)
    guilty = every.pop(1)
    guilty.advance(int(ids_of(guilty.mask)[0]))
    every[0].advance(int(ids_of(before[0])[0]))
    process.send_signal(fault)
    assert made.wait(10)
    assert "grammar takes " in guilty.error
    assert made._follower._process.pid != process.pid
    assert [state.error for state in every] == [None] * 3
    every[0].rollback(1)
    assert made.wait(10)
    for state, mask in zip(every, [before[0], *before[2:]]):
        assert np.array_equal(state.mask, mask)
    made.close()


def test_a_process_that_dies_idle_costs_nobody_anything(constraints):
    state = constraints.start(Grammar.regex("[ab]{5}c"))
    assert constraints.wait(10)
    for worker in (constraints._taster, constraints._follower):
        worker._process.kill()
        worker._process.wait()
    for _ in range(2):
        state.advance(int(ids_of(state.mask)[0]))
        assert constraints.wait(10, [state])
    other = constraints.start(Grammar.regex("[xy]{5}z"))
    assert constraints.wait(10)
    assert state.error is None
    assert other.error is None


@pytest.mark.timed
def test_who_leaves_takes_no_turn(constraints):
    """Nobody who comes later waits for the grammars of those who have gone."""
    hostile = [Grammar.lark(f'start: "{count}" X\nX: {CROSSED}') for count in range(50)]
    first = constraints.start(hostile[0])
    gone = [constraints.start(grammar) for grammar in hostile[1:]]
    kept, left = constraints.start(Grammar.regex("[a-z]{4}")), constraints.start(Grammar.regex("[a-z]{4}"))
    for state in [*gone, left]:
        state.close()
    assert list(constraints._tasted) == [hostile[0], kept._grammar]
    assert len(constraints._taster.unsent) <= 1000  # one operation at most, whoever waits
    first.close()
    began = time.monotonic()
    assert constraints.wait(20, [kept])  # one hostile grammar was being compiled, and is told apart from 50 by the time
    assert time.monotonic() - began < 15
    assert kept.error is None
    assert kept.mask is not None
    assert not constraints._tasted
    assert list(constraints._known) == [kept._grammar]


def test_too_many_new_grammars_fail_those_beyond():
    made = Constraints(DIRECTORY / "tokenizer.json", VOCAB, [END], ConstraintLimits(waiting=2))
    first, second, again = (made.start(Grammar.regex(pattern)) for pattern in ("ab", "cd", "cd"))
    beyond = made.start(Grammar.regex("ef"))
    assert beyond.error == "2 new grammars wait to be compiled, and no more may; try again later"
    beyond.close()
    assert made.wait(10)
    assert [state.error for state in (first, second, again)] == [None] * 3
    later = made.start(Grammar.regex("ef"))
    assert made.wait(10)
    assert later.error is None
    made.close()


def refuse(monkeypatch, times):
    """The next processes cannot begin."""
    left, real = [OSError(11, "Resource temporarily unavailable")] * times, subprocess.Popen

    def popen(*arguments, **settings):
        if left:
            raise left.pop()
        return real(*arguments, **settings)

    monkeypatch.setattr("hasten.engine.constraint.subprocess.Popen", popen)
    return left


def test_a_process_that_cannot_begin_fails_who_asked_and_nobody_later(constraints, monkeypatch):
    grammar = Grammar.regex("[a-z]{4}")
    refuse(monkeypatch, 1)  # what compiles
    first = constraints.start(grammar)
    assert "cannot begin: [Errno 11] Resource temporarily unavailable; try again later" in first.error
    second = constraints.start(grammar)
    assert constraints.wait(10)
    assert second.error is None
    processes = [constraints._taster._process, constraints._follower._process]
    constraints._follower._process.kill()
    constraints._follower._process.wait()
    refuse(monkeypatch, 1)  # what follows
    third, fourth = constraints.start(grammar), second.fork()
    assert constraints.wait(10)
    assert [state.error is None for state in (second, third, fourth)].count(True) >= 1
    assert "cannot begin" in next(state.error for state in (second, third, fourth) if state.error)
    assert processes[0] is constraints._taster._process
    for state in (first, second, third, fourth):
        state.close()
    last = constraints.start(grammar)
    assert constraints.wait(10)
    assert last.error is None


def test_a_follower_that_cannot_begin_fails_its_request_alone(engine, monkeypatch):
    """It begins when a taste went well, in the middle of a step."""
    grammar = Grammar.regex("[a-y]{4}z")
    engine.generate([[1]], drawing(0, max_tokens=9, grammar=grammar))
    constraints = engine._constraints
    constraints._follower.stop()
    left = refuse(monkeypatch, 1)
    new = Grammar.regex("[a-y]{5}z")
    bad, plain = engine.generate([[1], [1]], [drawing(0, max_tokens=9, grammar=new), drawing(0, max_tokens=9)])
    assert not left
    assert (bad.finish_reason, bad.token_ids) == ("error", ())
    assert "cannot begin" in bad.error
    assert plain.error is None
    (again,) = engine.generate([[1]], drawing(0, max_tokens=9, grammar=new))
    assert re.fullmatch(new.text, again.text)


# --- one sequence


def test_forks_go_their_own_ways(constraints):
    rng = np.random.default_rng(1)
    state = constraints.start(Grammar.regex("[a-c]{2}(x[0-9]{3}|y[a-f]{4})"))
    early = state.fork()  # before anything is known
    follow(constraints, state, rng, most=1)
    others = [state.fork() for _ in range(3)]
    assert constraints.wait(10)
    assert all(np.array_equal(other.mask, state.mask) for other in others)
    for other in [*others, early]:
        tokens = follow(constraints, other, rng)
        assert other.complete
        assert tokens
    assert not state.complete


def test_a_rollback_takes_tokens_back(constraints):
    rng = np.random.default_rng(2)
    state = constraints.start(Grammar.lark('start: ("[" /[a-z]/ "]"){20}'))
    masks = []
    for _ in range(8):
        assert constraints.wait(10)
        masks.append(state.mask.copy())
        state.advance(int(rng.choice(ids_of(state.mask))))
    for back in (1, 3, 4):
        state.rollback(back)
        assert constraints.wait(10)
        assert np.array_equal(state.mask, masks[len(state._tokens)])
    assert len(state._tokens) == 0


def test_a_model_without_an_end_of_text_ends_where_nothing_may_come():
    made = Constraints(DIRECTORY / "tokenizer.json", VOCAB, [])
    rng = np.random.default_rng(3)
    state = made.start(Grammar.regex("ab(cd)?"))
    while made.wait(10, [state]) and not state.complete:
        assert END not in ids_of(state.mask)
        state.advance(int(rng.choice(ids_of(state.mask))))
    assert state.error is None
    made.close()


def test_masks_have_the_width_of_the_logits():
    for vocab in (8192, 8200, 9000):
        made = Constraints(DIRECTORY / "tokenizer.json", vocab, [END])
        state = made.start(Grammar.regex("[a-z]+"))
        assert made.wait(10)
        assert state.mask.shape == (-(-vocab // 32),)
        assert state.mask.dtype == np.uint32
        assert ids_of(state.mask).max() < 8192
        made.close()


def test_a_tokenizer_that_cannot_be_held_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    made = Constraints(tmp_path / "tokenizer.json", 10, [0])
    made.start(Grammar.regex("a"))
    with pytest.raises(UserError, match="cannot be held to a grammar.*leave the grammar out"):
        made.wait(10)
    made.close()


def test_limits_hold_and_closing_ends_processes():
    made = Constraints(DIRECTORY / "tokenizer.json", VOCAB, [END], ConstraintLimits(known=2))
    for pattern in "abcdef":
        made.start(Grammar.regex(pattern))
    assert made.wait(10)
    assert len(made._known) == 2
    processes = [made._taster._process, made._follower._process]
    made.close()
    assert all(process.returncode is not None for process in processes)


@pytest.mark.timed
def test_what_compiles_for_long_ends_with_who_asked(constraints):
    """A fork that is held up while its parent is killed would be there for ever."""
    constraints.start(Grammar.regex("a"))
    assert constraints.wait(10)
    constraints.start(HOSTILE["crossed patterns"])
    children = Path(f"/proc/{(taster := constraints._taster._process.pid)}/task/{taster}/children")
    while not (forks := children.read_text().split()):
        constraints.poll()
    constraints.close()
    end = time.monotonic() + 5
    while any(Path(f"/proc/{fork}").exists() and "Z (" not in Path(f"/proc/{fork}/status").read_text() for fork in forks):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_waits_where_many_files_are_open(constraints):
    """Descriptors beyond 1,023 are none for select(2)."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        state = constraints.start(Grammar.regex("[ab]"))
        assert constraints.wait(10, [state])
        assert constraints._taster._out > 1023
    finally:
        for one in opened:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


# --- what a grammar may be


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("[^a]", r"[^\x00a]"), (r"\[^a]", r"\[^a]"), (r"x[^\]a]+[^b]", r"x[^\x00\]a]+[^\x00b]"), ("[^]a]", "[^]a]"), ("[[^a]", "[[^a]"),
        (r"[\[^a]", r"[\[^a]"), ("", ""), ("[^", r"[^\x00"), ("\\", "\\"), ("[a][^b]", r"[a][^\x00b]"),
    ],
)  # fmt: skip
def test_negated_classes_exclude_nul_as_well(pattern, plain):
    assert without_nul(pattern) == plain


def test_only_patterns_of_a_schema_are_rewritten():
    inner = {"type": "string", "pattern": "[^a]"}
    schema = {
        "properties": {"pattern": inner, "const": inner},
        "patternProperties": {"[^b]": {"enum": [{"pattern": "[^a]"}]}},
        "anyOf": [inner, True],
    }
    made = spelt_out(schema)
    new = {"type": "string", "pattern": r"[^\x00a]"}
    expected = {
        "properties": {"pattern": new, "const": new},
        "patternProperties": {r"[^\x00b]": {"enum": [{"pattern": "[^a]"}]}},
        "anyOf": [new, True],
    }
    assert json.dumps(made) == json.dumps(expected)


@pytest.mark.row("regex and grammars", "depth and size")
def test_grammars_are_checked_when_they_are_made():
    deep = {"type": "integer"}
    for _ in range(MAX_DEPTH + 1):
        deep = {"items": deep}
    for make, message in [
        (lambda: Grammar("peg", "x"), "grammar kind is 'peg'; accepted: json_schema, regex, lark"),
        (lambda: Grammar.regex(5), "regex is 5: give text"),
        (lambda: Grammar.regex(""), "regex has 0 bytes; accepted: 1 to"),
        (lambda: Grammar.regex("a" * (MAX_BYTES + 1)), f"regex has {MAX_BYTES + 1} bytes"),
        (lambda: Grammar.regex("\ud800"), "half a surrogate pair at character 0"),
        (lambda: Grammar.json_schema("{"), "json_schema is no JSON"),
        (lambda: Grammar.json_schema("[]"), "json_schema is \\[\\]: give an object"),
        (lambda: Grammar.json_schema({"a": {1, 2}}), "json_schema is no JSON"),
        (lambda: Grammar.json_schema('{"minimum": NaN}'), "NaN is no JSON number"),
        (lambda: Grammar.json_schema({"minimum": float("inf")}), "json_schema is no JSON"),
        (lambda: Grammar.json_schema(deep), f"nested deeper than {MAX_DEPTH} levels"),
        (lambda: Grammar.json_schema("[" * 100_000), f"nested deeper than {MAX_DEPTH} levels"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert Grammar.json_object() == Grammar.json_schema({"type": "object"})
    assert hash(Grammar.regex("a")) == hash(Grammar.regex("a"))
