"""`hasten distill`: students of every kind, what is written of them, text that the teacher writes, and what cannot be."""

import json
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from hasten.checkpoint import load
from hasten.compress.generated import Generated, generate_text
from hasten.compress.learn import Lesson, fresh, learn
from hasten.compress.students import weights_digest
from hasten.spec import Spec
from hasten.train import Settings, Steps, Work
from tests.cli import assert_refused, main

QUICK = ["--tokens", "128", "--sequence", "64", "--eval-tokens", "300", "--threads", "1", "--precision", "float32"]


@pytest.fixture
def hasten(monkeypatch, capsys):
    return lambda *arguments: main(monkeypatch, capsys, *arguments)


def narrow(width=32, blocks=2, heads=2):
    whole = msgspec.to_builtins(load("code-8m").spec)
    for block in whole["blocks"]:
        block["mixer"] |= {"heads": heads, "kv_heads": 1, "head_dim": 16, "value_dim": 16}
        block["mixer"]["position"]["dims"] = 16
        block["feed_forward"]["hidden"] = 48
    return whole | {"width": width, "context": 128, "blocks": whole["blocks"][:blocks]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Four narrow blocks with the bundled model's tokenizer, that know which tokens are frequent."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.py").write_text("".join(f"def f{place}(x):\n    return x + {place}\n\n" for place in range(100)))
    begun = fresh(Spec.from_data(narrow(blocks=4)), load("code-8m"), "teacher", 1)
    lesson = Lesson(Settings(budget=Steps(15), rate=0.02), folder / "text.py", 64, 256)
    learn(begun, lesson, folder / "teacher", Work(folder / "work", 1), tokens=64)
    return folder / "teacher"


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps(narrow(width=48, heads=3)))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.mkdir()
    for place in range(3):
        (path / f"{place}.py").write_text(f"def f{place}(x):\n    return x + {place}\n\n" * 30)
    return path


def parts_of(done):
    return json.loads(done.out)


def test_a_student_is_cut_and_taught(tmp_path, hasten, teacher, text):
    out = tmp_path / "out"
    done = hasten(
        "distill", teacher, out, "--depth", 2, "--temperature", 2, "--steps", 12, "--rate", "0.02", "--text", text, *QUICK, "--json"
    )
    assert done.code == 0, done.err
    facts = parts_of(done)
    assert facts["steps"] == len(facts["losses"]) == 12
    assert facts["last_loss"] < 0.9 * facts["first_loss"]
    student, original = load(out), load(str(teacher))
    assert len(student.spec.blocks) == 2
    assert (facts["bytes"], facts["teacher_bytes"]) == (student.weights.nbytes, original.weights.nbytes)
    assert facts["bytes"] < facts["teacher_bytes"]
    assert facts["retained"] == facts["held_out_top1_after"] / facts["held_out_top1_teacher"]
    assert facts["held_out_loss_after"] != facts["held_out_loss_before"] != facts["held_out_loss_teacher"]
    _, cut, taught = student.provenance
    assert (cut.transform, cut.settings) == ("cut-depth", {"layers": [0, 3]})
    assert taught.transform == "distill"
    assert taught.evidence["teacher_sha256"] == weights_digest(original)
    assert taught.evidence["retained"] == facts["retained"]
    assert taught.evidence["held_out_top1_after"] == facts["held_out_top1_after"]
    assert taught.settings["temperature"] == 2
    assert taught.settings["teacher"] == "fixed"
    assert not (tmp_path / ".out.work").exists()
    shown = hasten("inspect", out)
    assert "made by distill" in shown.out
    assert "teacher_sha256" in shown.out
    evaluated = json.loads(hasten("eval", out, "--limit", "300", "--window", "128", "--json").out)
    assert evaluated["loss"] == pytest.approx(facts["held_out_loss_after"], rel=1e-3)


def test_a_student_that_is_its_teacher_has_lost_nothing(tmp_path, hasten, teacher, text):
    everything = ["--labels", "0", "--hidden", "1", "--attention", "1"]
    asked = ["--layers", "0,1,2,3", *everything, "--steps", 1, "--text", text, *QUICK, "--json"]
    facts = parts_of(hasten("distill", teacher, tmp_path / "out", *asked))
    assert facts["first_loss"] == pytest.approx(0, abs=1e-4)
    assert facts["held_out_loss_before"] == facts["held_out_loss_teacher"]


def test_a_teacher_that_is_played_rounded(tmp_path, hasten, teacher, text):
    """What it says is not quite what it would say, and is written down."""
    asked = ["--layers", "0,1,2,3", "--steps", 1, "--text", text, *QUICK, "--json"]
    facts = parts_of(hasten("distill", teacher, tmp_path / "out", *asked, "--teacher-weights", "int4"))
    assert 1e-3 < facts["first_loss"] < 1
    (entry,) = [entry for entry in load(str(tmp_path / "out")).provenance if entry.transform == "distill"]
    assert entry.settings["teacher_weights"] == "int4"


def test_features_of_a_made_student(tmp_path, hasten, teacher, spec, text):
    """Another width and other heads: hidden states go through a projection, which is nowhere in what is written."""
    asked = ["--student", spec, "--hidden", "1", "--hidden-by", "cosine", "--attention", "1", "--attention-by", "relations"]
    done = hasten("distill", teacher, tmp_path / "out", *asked, "--steps", 10, "--rate", "0.02", "--text", text, *QUICK)
    assert done.code == 0, done.err
    assert "retained" in done.out
    assert "bytes of the teacher's" in done.out
    student = load(tmp_path / "out")
    assert student.spec == Spec.from_json(spec.read_bytes())
    assert not any("projection" in name for name in student.weights)
    assert student.provenance[-1].settings["pairs"] == [[0, 1], [1, 3]]
    assert student.provenance[-1].evidence["last_loss"] < student.provenance[-1].evidence["first_loss"]


@pytest.mark.parametrize("kind", ["online", "mutual"])
def test_a_teacher_that_learns_too(tmp_path, hasten, teacher, spec, text, kind):
    more = ["--peer", spec] if kind == "mutual" else []
    asked = [
        "--depth",
        2,
        f"--{kind}",
        *more,
        "--keep",
        tmp_path / "others",
        "--steps",
        6,
        "--rate",
        "0.02",
        "--text",
        text,
        *QUICK,
        "--json",
    ]
    done = hasten("distill", teacher, tmp_path / "out", *asked)
    assert done.code == 0, done.err
    others = {path.name for path in (tmp_path / "others").iterdir()}
    assert others == ({"teacher", "peer1"} if kind == "mutual" else {"teacher"})
    learned, before = load(str(tmp_path / "others" / "teacher")), load(str(teacher))
    assert not np.array_equal(learned.weights.array("norm.weight"), before.weights.array("norm.weight"))
    assert learned.spec == before.spec
    assert load(tmp_path / "out").provenance[-1].settings["teacher"] == kind
    assert load(tmp_path / "out").provenance[-1].evidence["teacher_sha256"] == weights_digest(before)


def test_labels_alone(tmp_path, hasten, teacher, text):
    """Without a weight for the teacher, it is `hasten train` on the same student."""
    asked = ["--steps", 5, "--text", text, *QUICK, "--json"]
    taught = parts_of(hasten("distill", teacher, tmp_path / "out", "--depth", 2, "--soft", 0, "--labels", 1, *asked))
    assert hasten("distill", teacher, tmp_path / "cut", "--depth", 2, "--steps", 1, "--rate", "1e-12", "--text", text, *QUICK).code == 0
    alone = parts_of(hasten("train", tmp_path / "cut", tmp_path / "alone", *asked))
    assert taught["losses"] == pytest.approx(alone["losses"], abs=1e-4)


def test_a_teacher_writes_what_is_learned(tmp_path, hasten, teacher):
    asked = ["--depth", 2, "--generate", 600, "--steps", 3, *QUICK, "--json"]
    done = hasten("distill", teacher, tmp_path / "out", *asked)
    assert done.code == 0, done.err
    evidence = load(tmp_path / "out").provenance[-1].evidence
    assert evidence["text"] == f"600 tokens that {teacher} writes at temperature 1, seed 0"
    again = hasten("distill", teacher, tmp_path / "again", *asked)
    assert parts_of(again)["losses"] == parts_of(done)["losses"]
    other = hasten("distill", teacher, tmp_path / "other", *asked, "--seed", 1)
    assert load(tmp_path / "other").provenance[-1].evidence["sha256"] != evidence["sha256"]
    assert other.code == 0
    trained = hasten("train", teacher, tmp_path / "trained", "--generate", 600, "--steps", 3, *QUICK, "--json")
    assert trained.code == 0, trained.err
    assert load(tmp_path / "trained").provenance[-1].evidence["sha256"] == evidence["sha256"]


def test_writing_that_was_cut_off_goes_on_to_the_same_text(tmp_path, teacher):
    model = load(str(teacher))
    whole = generate_text(Generated(model, 700, 3), tmp_path / "whole", 64).read_text()
    assert len(whole.splitlines()) == 11
    assert len(set(whole.splitlines())) == 11

    class Stop(Exception):
        pass

    def stop(done, documents):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        generate_text(Generated(model, 700, 3, report=stop), tmp_path / "cut", 64)
    (part,) = (tmp_path / "cut").iterdir()
    assert part.suffix == ".part"
    with part.open("a") as file:
        file.write('{"line": 9, "te')  # a line that the kill cut through
    seen = []
    again = generate_text(Generated(model, 700, 3, report=lambda done, documents: seen.append(done)), tmp_path / "cut", 64)
    assert again.read_text() == whole
    assert seen[0] == 4
    assert generate_text(Generated(model, 700, 3), tmp_path / "cut", 64) == again
    assert generate_text(Generated(model, 700, 4), tmp_path / "cut", 64).read_text() != whole


def test_a_killed_distillation_goes_on_to_the_same_losses(tmp_path, hasten, teacher, text):
    asked = ["--depth", 2, "--mutual", "--steps", 6, "--text", text, *QUICK, "--json"]
    whole = parts_of(hasten("distill", teacher, tmp_path / "whole", *asked))
    command = [sys.executable, "-m", "hasten.cli", "distill", teacher, tmp_path / "cut", *asked]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = tmp_path / ".cut.work" / "state.safetensors"
    while not state.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut").exists()
    again = parts_of(hasten("distill", teacher, tmp_path / "cut", *asked))
    assert again["losses"] == whole["losses"]
    one, other = (load(tmp_path / name) for name in ("whole", "cut"))
    assert all(np.array_equal(one.weights.array(name), other.weights.array(name)) for name in one.weights)


def test_refusals(tmp_path, hasten, teacher, spec, text):
    out, quick = tmp_path / "out", ["--steps", 1, "--text", text, *QUICK]
    asked = ["--depth", 2, *quick]

    def refused(*options, said, student=("--depth", 2)):
        assert_refused(hasten("distill", teacher, out, *student, *quick, *options), said)

    refused(said="one student is needed", student=())
    refused(said="one student is needed", student=("--depth", 2, "--student", spec))
    refused(said="depth is 5; accepted are 1 to 4", student=("--depth", 5))
    refused(said="--layers is '0,x'; accepted: blocks of", student=("--layers", "0,x"))
    refused(said="layers [2, 1] are no rising list", student=("--layers", "2,1"))
    refused(said="cannot be read", student=("--student", tmp_path / "none.json"))
    refused("--online", "--mutual", said="give one")
    refused("--peer", spec, said="give --mutual too")
    refused("--keep", tmp_path / "keep", said="give --online or --mutual")
    refused("--divergence", "sideways", said="--divergence is 'sideways'; accepted: forward, reverse, jensen-shannon")
    refused("--hidden-by", "l1", said="accepted: mse, cosine")
    refused("--attention-by", "values", said="accepted: maps, relations")
    refused("--temperature", "0", said="temperature is 0.0")
    refused("--labels", "-1", said="the weight of labels is -1.0")
    refused("--hidden", "nan", said="the weight of hidden is nan")
    refused("--soft", "0", said="teaches nothing")
    refused("--teacher-weights", "int9", said="int9")
    refused("--teacher-weights", "int8", "--online", said="teacher_weights is int8, for a teacher that stays as it is")
    refused("--teacher-weights", "int8", "--hidden", "1", said="teacher_weights is int8, for a teacher that stays as it is")
    refused("--hidden", "1", "--pairs", "0:7", said="0:7 pairs a block that is not there")
    refused("--pairs", "0-1", said="--pairs is '0-1'")
    refused("--attention", "1", said="compare relations", student=("--student", spec))
    refused("--generate", "100", said="give one")
    refused("--minutes", "1", said="give one")
    (tmp_path / "small.json").write_text(json.dumps(narrow() | {"vocab": 100}))
    refused(said="ids up to 8191 and the Spec has a vocabulary of 100", student=("--student", tmp_path / "small.json"))
    (tmp_path / "large.json").write_text(json.dumps(narrow() | {"vocab": 9000}))
    refused(said="a vocabulary of 9000", student=("--student", tmp_path / "large.json"))
    refused(said="no tokenizer", student=("--student", "random:tinyllama-1.1b"))
    assert_refused(hasten("distill", "random:tinyllama-1.1b", out, *asked), "no tokenizer")
    assert_refused(hasten("train", spec, out, "--generate", 10), "--written-by")
    assert_refused(hasten("train", teacher, out, "--written-by", teacher, *quick), "--generate, too")
    (out / "kept").mkdir(parents=True)
    assert_refused(hasten("distill", teacher, out, *asked), "exists and is not empty")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
