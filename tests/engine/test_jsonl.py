"""`hasten generate --input --output`: the answers of `LLM`, whatever is wrong with other lines, and after a kill the same."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.engine import BeamSearch, Grammar
from tests.cli import ENVIRONMENT, main

PROMPTS = ["import json\n", "def add(a, b):\n    ", "class Stack:", "größer = ", "return"]


def written(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def answers(path):
    return {answer["line"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def test_answers_are_those_of_the_llm(tmp_path, monkeypatch, capsys):
    fields = [{}, {"max_tokens": 3, "id": "short"}, {"temperature": 1.0, "seed": 7}, {"stop": ["\n"]}, {}]
    lines = [{"prompt": prompt, **extra} for prompt, extra in zip(PROMPTS, fields)]
    source = written(tmp_path / "in.jsonl", [lines[0], "", *lines[1:], {"token_ids": [1, 2, 3], "max_tokens": 2}])
    outcome = main(monkeypatch, capsys, "generate", "code-8m", "--input", source, "--output", tmp_path / "out.jsonl", "-n", "9")
    assert outcome.code == 0
    assert "answered 6 prompts" in outcome.err
    found = answers(tmp_path / "out.jsonl")
    assert sorted(found) == [0, 2, 3, 4, 5, 6]
    llm = LLM("code-8m")
    for number, prompt, extra in zip([0, 2, 3, 4, 5], PROMPTS, fields):
        params = SamplingParams(**{"max_tokens": 9, **{name: value for name, value in extra.items() if name != "id"}})
        (expected,) = llm.generate(prompt, params)
        assert (found[number]["text"], found[number]["token_ids"]) == (expected.text, list(expected.token_ids))
        assert found[number]["finish_reason"] == expected.finish_reason
        assert found[number]["id"] == extra.get("id")
    assert len(found[6]["token_ids"]) == 2


def test_a_line_may_ask_for_all_that_a_request_may(tmp_path, monkeypatch, capsys):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    lines = [
        {"prompt": PROMPTS[0], "n": 2, "best_of": 3, "temperature": 1.0, "seed": 3, "logprobs": 1},
        {"prompt": PROMPTS[1], "grammar": {"json_schema": schema}},
        {"prompt": PROMPTS[2], "beam": {"width": 3, "length_penalty": 0.5}, "n": 2},
        {"prompt": PROMPTS[3], "logit_bias": {"200": 4.5}, "echo": True, "prompt_logprobs": 0},
        {"prompt": PROMPTS[4], "logit_bias": {"9999": 1}},
    ]
    source = written(tmp_path / "in.jsonl", lines)
    outcome = main(monkeypatch, capsys, "generate", "code-8m", "--input", source, "--output", tmp_path / "out.jsonl", "-n", "8")
    assert "answered 4 prompts" in outcome.err
    found = answers(tmp_path / "out.jsonl")
    asked = [
        SamplingParams(max_tokens=8, n=2, best_of=3, temperature=1.0, seed=3, logprobs=1),
        SamplingParams(max_tokens=8, grammar=Grammar.json_schema(schema)),
        SamplingParams(max_tokens=8, beam=BeamSearch(width=3, length_penalty=0.5), n=2),
        SamplingParams(max_tokens=8, logit_bias={200: 4.5}, echo=True, prompt_logprobs=0),
    ]
    llm = LLM("code-8m")
    for number, params in enumerate(asked):
        expected = llm.generate(PROMPTS[number], params)
        its = found[number].get("outputs", [found[number]])
        assert [(one["text"], tuple(one["token_ids"]), one["finish_reason"]) for one in its] == [
            (one.text, one.token_ids, one.finish_reason) for one in expected
        ]
        for name in ("logprobs", "prompt_logprobs"):
            shown = [None if (entries := getattr(one, name)) is None else [entry.logprob for entry in entries] for one in expected]
            assert [None if (entries := one.get(name)) is None else [entry["logprob"] for entry in entries] for one in its] == shown
    assert found[3]["text"].startswith(PROMPTS[3])
    assert "9999" in found[4]["error"]


def test_a_line_that_is_refused_is_answered_so(tmp_path, monkeypatch, capsys):
    source = written(tmp_path / "in.jsonl", [{"prompt": "x = "}, {"token_ids": [9999]}, {"token_ids": [1] * 3000}])
    outcome = main(monkeypatch, capsys, "generate", "code-8m", "--input", source, "--output", tmp_path / "out.jsonl", "-n", "4")
    assert outcome.code == 0
    assert "answered 1 prompts" in outcome.err
    found = answers(tmp_path / "out.jsonl")
    assert [found[number]["finish_reason"] for number in range(3)] == ["length", "error", "error"]
    assert "outside the vocabulary" in found[1]["error"]
    assert "3000 tokens" in found[2]["error"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"), ("[1]", "not an object"), ({"text": "x"}, 'needs "prompt"'), ({"prompt": 3}, 'needs "prompt"'),
        ({"prompt": "x", "token_ids": [1]}, "one of them"), ({"prompt": "x", "topk": 3}, "'topk'; accepted"),
        ({"prompt": "x", "top_p": 3}, "line 2: top_p is 3"), ({"prompt": "x", "grammar": "a"}, "grammar is 'a'; accepted"),
        ({"prompt": "x", "grammar": {"regex": 3}}, "line 2: regex is 3"), ({"prompt": "x", "beam": {"n": 3}}, "with a width"),
    ],
)  # fmt: skip
def test_bad_lines_are_named_before_anything_runs(tmp_path, monkeypatch, capsys, line, said):
    source = written(tmp_path / "in.jsonl", [{"prompt": "x"}, line])
    outcome = main(monkeypatch, capsys, "generate", "code-8m", "--input", source, "--output", tmp_path / "out.jsonl")
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out.jsonl").exists()


def test_files_and_options_that_are_refused(tmp_path, monkeypatch, capsys):
    source, output = written(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl"
    output.write_text("my diary\n")
    for arguments, said in (
        (["--input", source], "go together"), (["--output", output], "go together"),
        (["--input", source, "--output", output, "-p", "x"], "give the prompt once"),
        (["--input", tmp_path / "none", "--output", output], "cannot read"),
        (["--input", source, "--output", output], "not an answer of an earlier run"),
    ):  # fmt: skip
        outcome = main(monkeypatch, capsys, "generate", "code-8m", *arguments)
        assert outcome.code == 2
        assert said in outcome.err
    assert output.read_text() == "my diary\n"


def test_a_killed_run_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    lines = [{"token_ids": rng.integers(0, 8192, 12).tolist(), "temperature": 0.8, "seed": seed} for seed in range(30)]
    source = written(tmp_path / "in.jsonl", lines)

    def start(output):
        options = ["--input", source, "--output", output, "-n", "60", "--ignore-eos", "--max-sequences", "3"]
        return subprocess.Popen(
            [sys.executable, "-m", "hasten.cli", "generate", "code-8m", *map(str, options)], env={**os.environ, **ENVIRONMENT},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    whole = start(tmp_path / "whole.jsonl")
    killed = start(tmp_path / "killed.jsonl")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed.jsonl").exists() or len((tmp_path / "killed.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = (tmp_path / "killed.jsonl").read_bytes()
    assert 5 <= len(before.splitlines()) < 30
    (tmp_path / "killed.jsonl").write_bytes(before[:-7])  # as if the last line had been cut
    assert start(tmp_path / "killed.jsonl").wait() == 0
    assert whole.wait() == 0
    assert (tmp_path / "killed.jsonl").read_bytes().startswith(before[: before[:-1].rfind(b"\n") + 1])  # what was there stays
    assert answers(tmp_path / "killed.jsonl") == answers(tmp_path / "whole.jsonl")
    assert len(answers(tmp_path / "killed.jsonl")) == 30
    assert len((tmp_path / "killed.jsonl").read_text().splitlines()) == 30
