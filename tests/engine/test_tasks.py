"""`hasten eval MODEL --tasks …`: lm-eval's tasks from local files, and its own player of transformers as the judge."""

import importlib.util
import json
import math
import sys

import pytest

from hasten.checkpoint import bundled_directory, load
from hasten.measure.harness import Harness, rolling_windows
from tests.cli import assert_refused, main

INSTALLED = importlib.util.find_spec("lm_eval") is not None
with_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: pip install 'hasten[tasks]' (600 MB)")
HFLM = INSTALLED and importlib.util.find_spec("accelerate") is not None
with_hflm = pytest.mark.skipif(not HFLM, reason="lm-eval's own player of transformers needs lm-eval and accelerate")

CHOICES = [
    ("import os\nimport ", ["sys\n", "banana(", "json\n"], 0),
    ("def f(x):\n    return", [" x", " )", " class"], 0),
    ("for i in range(10):\n    print(", ["return", "i)", "def"], 1),
    ("try:\n    f()\nexcept", [" ValueError:", " 7", "="], 0),
    ("x = [1, 2,", [" 3]", " )", "}"], 2),  # marked wrongly, so that not all is right
]
LONG = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Reader:\n" * 3


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A function that writes a task and its data, and gives its file."""
    if INSTALLED:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, rows, lines):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = tmp_path / f"{name}.yaml"
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\ntest_split: test\n"
        file.write_text(f"task: {name}\n{files}{lines}\n")
        return file

    return write


def test_without_the_extra_it_is_named(hasten, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(hasten("eval", "code-8m", "--tasks", "hellaswag"), "'tasks'", "pip install 'hasten[tasks]'")


def test_options_that_do_not_go_together(hasten, tmp_path):
    assert_refused(hasten("eval", "code-8m", "--shots", 3), "--tasks")
    assert_refused(hasten("eval", "code-8m", tmp_path, "--tasks", "x.yaml"), "no TEXT")
    assert_refused(hasten("eval", "code-8m", "--window", 8, "--tasks", "x.yaml"), "--window")


@with_lm_eval
def test_a_choice_of_local_data(task, hasten):
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in CHOICES]
    file = task(
        "local_choice", rows,
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]',
    )  # fmt: skip
    done = hasten("eval", "code-8m", "--tasks", file, "--json")
    assert done.code == 0, done.err
    (score,) = json.loads(done.out)["tasks"]
    played = Harness(load("code-8m"))
    right = 0
    for question, choices, answer in CHOICES:
        each = [total for total, _ in played.loglikelihood([(question, choice) for choice in choices])]
        right += each.index(max(each)) == answer
    assert 0 < right < len(CHOICES)
    assert score["value"] == right / len(CHOICES)
    assert (score["task"], score["metric"], score["samples"], score["shots"]) == ("local_choice", "acc", len(CHOICES), 0)
    limited = hasten("eval", "code-8m", "--tasks", file, "--limit", 2)
    assert "local_choice" in limited.out
    assert "2 examples each" in limited.out


@with_lm_eval
def test_texts_and_generations_of_local_data(task, hasten):
    played = Harness(load("code-8m"))
    (word,) = played.generate_until([("import os\nimport ", {"until": ["\n"], "max_gen_toks": 6})])
    assert word.strip()
    text = task(
        "local_text", [{"page": LONG}, {"page": "import os\n"}],
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\nmetric_list: [{metric: bits_per_byte}]',
    )  # fmt: skip
    made = task(
        "local_made", [{"begin": "import os\nimport ", "end": word}, {"begin": "import os\nimport ", "end": "nothing"}],
        'output_type: generate_until\ndoc_to_text: "{{begin}}"\ndoc_to_target: "{{end}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]',
    )  # fmt: skip
    done = hasten("eval", "code-8m", "--tasks", f"{text},{made}", "--json")
    assert done.code == 0, done.err
    scores = {each["metric"]: each for each in json.loads(done.out)["tasks"]}
    total = sum(played.loglikelihood_rolling([LONG, "import os\n"]))
    assert scores["bits_per_byte"]["value"] == pytest.approx(-total / (len(LONG) + 10) / math.log(2))
    assert scores["exact_match"]["value"] == 0.5


@with_lm_eval
def test_tasks_that_are_not_there(hasten, task, tmp_path):
    assert_refused(hasten("eval", "code-8m", "--tasks", tmp_path / "none.yaml"), "none.yaml", "YAML file")
    file = task("gone", [], "output_type: generate_until\ndoc_to_text: x\ndoc_to_target: y")
    (tmp_path / "gone.jsonl").unlink()
    done = hasten("eval", "code-8m", "--tasks", file)
    assert done.code == 2
    assert "the task or its data cannot be had" in done.err
    (tmp_path / "odd.yaml").write_text("- 1\n")
    assert hasten("eval", "code-8m", "--tasks", tmp_path / "odd.yaml").code == 2


@with_hflm
def test_answers_are_those_of_lm_evals_own_player():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    judge = HFLM(pretrained=str(bundled_directory("code-8m")), dtype="float32", device="cpu", batch_size=3, max_length=48)
    model = load("code-8m")
    import dataclasses

    import msgspec

    from hasten.measure.tasks import as_lm

    lm = as_lm(Harness(dataclasses.replace(model, spec=msgspec.structs.replace(model.spec, context=48)), backend="reference"))

    def ask(kind, each):
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in each]

    pairs = [(question, choice) for question, choices, _ in CHOICES for choice in choices]
    pairs += [("", "import os\n"), ("", "x"), (LONG, " = 1"), ("a ", "b"), ("a \n", "b"), ("x = (1,", LONG[:90])]
    ours, theirs = (each.loglikelihood(ask("loglikelihood", pairs)) for each in (lm, judge))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}

    texts = [(LONG,), ("x",), (LONG[:150],), (LONG * 2,)]
    ours, theirs = (each.loglikelihood_rolling(ask("loglikelihood_rolling", texts)) for each in (lm, judge))
    assert ours == pytest.approx(theirs, abs=3e-3)

    prompts = [
        (LONG, {"until": ["\n\n", "return"], "max_gen_toks": 20}),
        ("import os\nimport ", {"until": ["\n"], "max_gen_toks": 12}),
        ("def f(x):\n", {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
        ("class A:\n    def ", {"until": [":", "("], "max_gen_toks": 12}),
    ]
    ours, theirs = (each.generate_until(ask("generate_until", prompts)) for each in (lm, judge))
    assert ours == theirs

    for count in (0, 1, 47, 48, 49, 96, 97, 200):
        ids = list(range(count))
        wanted = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 7, 48, 1)]
        assert rolling_windows(ids, 7, 48) == wanted
