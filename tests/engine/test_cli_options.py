"""Options of `generate` and `chat`: each does what `LLM` does when asked the same, and a wrong value is one line and exit code 2."""

import inspect
import json
import re

import pytest

from hasten import LLM, SamplingParams
from hasten.cli import options
from hasten.cli.chat import chat
from hasten.cli.generate import generate
from hasten.engine import BeamSearch, Grammar
from tests.cli import assert_refused, main

PROMPT = "import json\n\n\ndef read_config(path):\n    "
SCHEMA = {"enum": ["x", "yy", 34]}
LARK = 'start: "(" (/[0-9]/ ","?)~3 ")"'


@pytest.fixture(scope="module")
def llm():
    return LLM("code-8m")


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments, stdin="": main(monkeypatch, capsys, *arguments, stdin=stdin)


def said(outcome):
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def same(lines, completions):
    assert [(one["choice"], one["text"], one["token_ids"], one["finish_reason"]) for one in lines] == [
        (one.choice, one.text, list(one.token_ids), one.finish_reason) for one in completions
    ]


# --- good use


def asked(command, *arguments):
    return said(command("generate", "code-8m", "-p", PROMPT, "--json", *arguments))


@pytest.mark.parametrize("place", ["file", "inline"])
@pytest.mark.parametrize("kind", ["--json-schema", "--grammar"])
def test_a_grammar_is_a_file_or_the_text_itself(kind, place, command, llm, tmp_path):
    text = json.dumps(SCHEMA) if kind == "--json-schema" else LARK
    (tmp_path / "grammar").write_text(text)
    lines = asked(command, kind, tmp_path / "grammar" if place == "file" else text, "-n", 40)
    grammar = Grammar.json_schema(SCHEMA) if kind == "--json-schema" else Grammar.lark(LARK)
    same(lines, llm.generate(PROMPT, SamplingParams(max_tokens=40, grammar=grammar)))
    assert lines[0]["finish_reason"] == "stop"
    if kind == "--json-schema":
        assert json.loads(lines[0]["text"]) in SCHEMA["enum"]
    else:
        assert re.fullmatch(r"\(([0-9],?){3}\)", lines[0]["text"])


def test_regex(command, llm):
    lines = asked(command, "--regex", "[a-z]{3}-[0-9]{2}", "-t", 1, "--seed", 3)
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", lines[0]["text"])
    grammar = Grammar.regex("[a-z]{3}-[0-9]{2}")
    same(lines, llm.generate(PROMPT, SamplingParams(temperature=1.0, seed=3, grammar=grammar)))
    text = command("generate", "code-8m", "-p", PROMPT, "--regex", "[a-z]{3}-[0-9]{2}", "-t", 1, "--seed", 3)
    assert text.out == lines[0]["text"] + "\n"


def test_choices_and_best_of(command, llm):
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=4, n=3)
    same(asked(command, "-n", 9, "-t", 1, "--seed", 4, "--choices", 3), llm.generate(PROMPT, params))
    text = command("generate", "code-8m", "-p", PROMPT, "-n", 9, "-t", 1, "--seed", 4, "--choices", 3).out
    assert text == "\n---\n".join(one.text for one in llm.generate(PROMPT, params)) + "\n"
    best = SamplingParams(max_tokens=9, temperature=1.0, seed=4, n=2, best_of=6)
    lines = asked(command, "-n", 9, "-t", 1, "--seed", 4, "--choices", 2, "--best-of", 6)
    same(lines, llm.generate(PROMPT, best))
    assert len({*map(str, lines)}) == 2


def test_beams(command, llm):
    params = SamplingParams(max_tokens=9, n=2, beam=BeamSearch(width=4, length_penalty=0.3))
    lines = asked(command, "-n", 9, "--beams", 4, "--choices", 2, "--length-penalty", 0.3)
    same(lines, llm.generate(PROMPT, params))
    wide = asked(command, "-n", 4, "--beams", 40)  # more than run together unless asked for
    assert len(wide[0]["token_ids"]) == 4


def test_logprobs(command, llm):
    (line,) = asked(command, "-n", 5, "--logprobs", 3, "--prompt-logprobs", 1)
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=1))
    assert line["logprobs"] == json.loads(json.dumps([entry.plain() for entry in expected.logprobs]))
    assert line["prompt_logprobs"] == json.loads(json.dumps([entry.plain() for entry in expected.prompt_logprobs]))
    assert [len(entry["top"]) for entry in line["logprobs"]] == [3] * 5
    (none,) = asked(command, "-n", 5, "--logprobs", 0)
    assert [entry["top"] for entry in none["logprobs"]] == [{}] * 5
    assert "logprobs" not in asked(command, "-n", 5)[0]


def test_memory_and_context(command):
    outcome = command("generate", "code-8m", "-p", PROMPT, "-n", 3, "--memory", "60MB", "--max-model-len", 64, "--json")
    assert len(said(outcome)[0]["token_ids"]) == 3
    assert re.fullmatch(
        r"hasten: memory: weights [\d,]+, cache [\d,]+ \(4,096 tokens\), arena [\d,]+; together [\d,]+ bytes\n", outcome.err
    )
    cut = asked(command, "--max-model-len", 40, "-n", 100, "--ignore-eos")[0]
    assert len(cut["prompt_token_ids"]) + len(cut["token_ids"]) == 40
    assert cut["finish_reason"] == "length"
    full = command("generate", "code-8m", "-p", PROMPT, "--max-model-len", 8)
    assert (full.code, full.out) == (2, "")
    assert "9 tokens; with a context of 8 at most 7 leave room to answer" in full.err.splitlines()[-1]


def test_chat_takes_what_generate_takes(command):
    outcome = command("chat", "code-8m", "-t", 0, "--regex", "yes|no", "--memory", "60MB", "--max-model-len", 64, stdin="is it?\nsure?\n")
    assert outcome.code == 0, outcome.err
    assert all(answer in {"yes", "no"} for answer in outcome.out.split())
    assert len(outcome.out.split()) == 2
    assert "memory: weights" in outcome.err
    outcome = command("chat", "code-8m", "--regex", "(", stdin="is it?\n")
    assert "is refused" in outcome.err
    assert "/clear begins anew" in outcome.err


def test_both_commands_have_the_same_options():
    """But for their defaults: these are the one source's."""
    shared = {*inspect.signature(options.Drawing).parameters, *inspect.signature(options.Placing).parameters}
    for spread in (generate, chat):
        assert shared <= set(inspect.signature(spread).parameters)
    defaults = {name: inspect.signature(chat).parameters[name].default for name in ("max_tokens", "temperature", "top_p", "top_k")}
    assert defaults == {"max_tokens": 512, "temperature": 0.7, "top_p": 0.95, "top_k": 0}


# --- wrong values

WRONG = [
    (["--json-schema", "no/such/file"], ["--json-schema 'no/such/file' cannot be read (No such file or directory)", "the text itself"]),
    (["--json-schema", "{"], ["json_schema", "JSON"]),
    (["--json-schema", '{"type": "nothing"}'], ["json_schema", "is refused"]),
    (["--regex", "("], ["regex", "is refused"]),
    (["--grammar", "no/such/file"], ["--grammar 'no/such/file' cannot be read"]),
    (["--grammar", "start: nothing"], ["lark", "is refused"]),
    (["--regex", "a", "--grammar", 'start: "a"'], ["give one of --json-schema, --regex and --grammar"]),
    (["--regex", "a", "--ignore-eos"], ["ignore_eos is true with a grammar"]),
    (["--choices", "0"], ["--choices is 0; accepted: a number of outputs, 1 or more"]),
    (["--choices", "65"], ["n is 65", "from 1 to 64"]),
    (["--best-of", "2", "--choices", "3"], ["best_of is 2", "from 3 to 64", "leave it out to draw n"]),
    (["--best-of", "65"], ["best_of is 65", "from 1 to 64"]),
    (["--beams", "0"], ["beam width is 0", "from 1 to 64"]),
    (["--beams", "65"], ["beam width is 65", "from 1 to 64"]),
    (["--beams", "4", "-t", "1"], ["temperature is 1.0 with beam search"]),
    (["--beams", "2", "--choices", "3"], ["n is 3 with a beam width of 2"]),
    (["--beams", "2", "--length-penalty", "nan"], ["length_penalty is nan"]),
    (["--logprobs", "3"], ["--logprobs and --prompt-logprobs are for programs; add --json"]),
    (["--logprobs", "129", "--json"], ["logprobs is 129", "from 0 to 128"]),
    (["--logprobs", "-1", "--json"], ["logprobs is -1", "from 0 to 128"]),
    (["--memory", "much"], ["--memory is 'much'", "as in 8GB"]),
    (["--memory", "1MB"], ["1,000,000 bytes of memory are not enough", "give at least", "or a smaller --max-model-len"]),
    (["--max-model-len", "1"], ["context 1 is out of range", "2 to 2048"]),
    (["--max-model-len", "4096"], ["context 4096 is out of range", "2 to 2048"]),
    (["--logit-bias", "a=b"], ["--logit-bias is 'a=b'", "198=-100"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_value_is_one_line(arguments, fragments, command):
    assert_refused(command("generate", "code-8m", "-p", PROMPT, *arguments), *fragments)


@pytest.mark.parametrize(
    "arguments", [["--choices", "many"], ["--beams", "2.5"], ["--max-model-len", "long"], ["--logprobs", "x", "--json"]]
)
def test_what_is_no_number_is_a_usage_error(arguments, command):
    outcome = command("generate", "code-8m", "-p", PROMPT, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"Invalid value for '{arguments[0]}'" in outcome.err
