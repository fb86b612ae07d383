"""What lm-eval asks of a model, next to transformers asked for one request at a time."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import torch
import transformers

from hasten.base.errors import ConfigError, UnsupportedError, UserError
from hasten.checkpoint import bundled_directory, load
from hasten.measure import harness as module
from hasten.measure.harness import Harness, generation, rolling_windows, until

CONTEXT = 48
LONG = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Reader:\n    def __init__(self, path):\n" * 3


def short(model, context):
    return dataclasses.replace(model, spec=msgspec.structs.replace(model.spec, context=context))


@pytest.fixture(scope="module")
def model():
    return short(load("code-8m"), CONTEXT)


@pytest.fixture(scope="module")
def judge():
    directory = bundled_directory("code-8m")
    return (
        transformers.AutoTokenizer.from_pretrained(directory),
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(),
    )


def score_alone(network, context, continuation):
    """As HFLM says it: the last CONTEXT tokens that stand before one of the continuation's."""
    ids = [*context, *continuation][-(CONTEXT + 1) :]
    with torch.no_grad():
        rows = network(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(continuation) :]
    targets = torch.tensor(continuation)
    return rows.gather(-1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


REQUESTS = [
    ("import os\nimport ", "sys\n"),
    ("import os\nimport ", "banana("),
    ("import os\nimport ", "sys\n"),  # the same once more
    ("import os\nimport", " json\nimport re\n"),
    ("", "import os\n"),
    ("", "x"),
    ("for i in range(10):\n    print(  ", "i)"),
    (LONG, "        self.path = path\n"),
    (LONG, "        return"),
    ("x = (1,", LONG[:90]),
]


def pairs(tokenizer):
    for context, continuation in REQUESTS:
        stem = context.rstrip()
        before = tokenizer.encode(stem) if stem else [0]
        whole = tokenizer.encode(context + continuation)
        yield before, whole[len(before) if context else 0 :]


@pytest.mark.parametrize(("backend", "near"), [("reference", 2e-4), ("cpu", 0.25)])
@pytest.mark.parametrize("rows", [None, 5])
def test_likelihoods_are_those_of_transformers(model, judge, backend, near, rows, monkeypatch):
    if rows is not None:  # logits of so few rows at a time that continuations are played in pieces
        monkeypatch.setattr(module, "LOGITS_BYTES", rows * 4 * model.spec.vocab)
    tokenizer, network = judge
    heard = []
    played = Harness(model, backend=backend, together=3, report=lambda *said: heard.append(said))
    found = played.loglikelihood(REQUESTS)
    wanted = [score_alone(network, *pair) for pair in pairs(tokenizer)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=near)
    if backend == "reference":
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert len({greedy for _, greedy in wanted}) == 2  # both happen
    assert heard[-1][1:] == (len(REQUESTS), len(REQUESTS))
    assert found == Harness(model, backend=backend, together=16).loglikelihood(REQUESTS) or backend == "reference"


def test_a_whole_text_is_scored_in_windows(model, judge):
    tokenizer, network = judge
    texts = [LONG, "x", "", LONG[:150]]
    found = Harness(model, backend="reference").loglikelihood_rolling(texts)
    for text, total in zip(texts, found, strict=True):
        ids, alone = tokenizer.encode(text), 0.0
        for begin in range(0, len(ids), CONTEXT):
            end = min(begin + CONTEXT, len(ids))
            alone += score_alone(network, [0, *ids][max(0, end - CONTEXT) : begin + 1], ids[begin:end])[0]
        assert total == pytest.approx(alone, abs=1e-3)
    assert found[2] == 0.0


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 13, 14, 15, 50])
def test_windows_score_each_token_once_with_all_the_context_there_is_room_for(count):
    ids, longest = list(range(100, 100 + count)), 7
    windows = rolling_windows(ids, 1, longest)
    assert [token for _, continuation in windows for token in continuation] == ids
    for number, (context, continuation) in enumerate(windows):
        assert len(context) + len(continuation) == (min(count, longest) + 1 if number == 0 else longest + 1)
        first = ids.index(continuation[0])
        assert context == ([1, *ids[:first]])[-len(context) :]


def generate_alone(tokenizer, network, context, most, stops):
    ids = tokenizer.encode(context)[-(CONTEXT - most) :]
    made = []
    with torch.no_grad():
        while len(made) < most and not any(stop in tokenizer.decode(made) for stop in stops):
            made.append(int(network(torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
            if made[-1] == 0:
                break
    text = tokenizer.decode(made, skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def test_generation_is_greedy_and_ends_where_it_should(model, judge):
    asked = [
        ("import os\nimport ", 12, ["\n"]),
        (LONG, 20, ["\n\n", "return"]),
        (LONG[:100], 8, []),
        ("def f(x):\n", 16, ["x"]),
    ]
    found = Harness(model, backend="reference", together=2).generate_until([
        (context, {"until": stops, "max_gen_toks": most, "do_sample": False}) for context, most, stops in asked
    ])
    assert found == [generate_alone(*judge, context, most, stops) for context, most, stops in asked]
    assert len(set(found)) == 4
    assert Harness(model, backend="reference").generate_until([]) == []


def test_settings_of_a_task_are_the_engines():
    its = generation({"until": "\n", "max_new_tokens": 3, "do_sample": False, "temperature": 0.7, "num_beams": 1}, 0)
    assert (its.max_tokens, its.temperature, its.stop, its.stop_token_ids) == (3, 0.0, ("\n",), (0,))
    its = generation({"until": ["", "a"], "do_sample": True, "top_k": 5}, None)
    assert (its.max_tokens, its.temperature, its.stop, its.top_k, its.stop_token_ids) == (256, 1.0, ("a",), 5, ())
    assert generation({"temperature": 0.5}, None).temperature == 0.5
    with pytest.raises(UnsupportedError, match="'num_beams'.*do_sample"):
        generation({"num_beams": 4}, None)
    with pytest.raises(ConfigError, match="temperature"):
        generation({"temperature": -1.0}, None)
    assert until("abcabc", ["c", "b"]) == "a"
    assert until("abc", []) == "abc"


def test_what_cannot_be_asked_is_refused(model):
    played = Harness(model)
    with pytest.raises(UserError, match="a continuation of 0 tokens"):
        played.loglikelihood([("x", "")])
    with pytest.raises(UserError, match="takes 1 to 48"):
        played.loglikelihood([("x", LONG)])
    with pytest.raises(ConfigError, match="asks for 48 tokens"):
        played.generate_until([("x", {"max_gen_toks": 48})])
    with pytest.raises(UserError, match="tokenizer"):
        Harness(load("random:smollm2-135m"))
    assert np.isfinite(played.loglikelihood([("x", " = 1")])[0][0])
    assert played.loglikelihood([]) == []
    assert not math.isnan(played.loglikelihood_rolling(["x"])[0])
