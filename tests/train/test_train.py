"""The trainer: against a loop that somebody else's model and optimizer make, and what it promises of its own."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
import transformers

from hasten import train
from hasten.base import hardware, heap
from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load_directory
from hasten.model import load_backend
from hasten.train import Batches, Example, Labels, Masked, Minutes, Plain, Settings, Soft, SoftLabels, Steps, Teacher, Work
from hasten.train.muon import Muon, orthogonal
from hasten.train.optimizers import Optimizers

VOCAB, STEPS = 97, 6
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


@pytest.fixture
def model(directory):
    return load_directory(directory, "small")


def windows(count=12, seed=0):
    random = np.random.default_rng(seed)
    return tuple(Example(tuple(random.integers(0, VOCAB, int(size)).tolist())) for size in random.integers(9, 22, count))


BATCHES = Batches(windows(), 4, seed=1)


def settings(**changed):
    return Settings(**{"budget": Steps(STEPS), "rate": 0.01, "warmup": 0.3, "decay": 0.5} | changed)


def run(model, folder, asked=None, batches=BATCHES, objective=None, masked=None, report=None, every_s=30.0):
    asked = asked or settings()
    program = asked.program(model.spec, 32)
    parameters = Plain.of(program, model.weights)
    if masked is not None:
        parameters = Masked(parameters, masked)
    work = Work(folder, 1, every_s=every_s) if report is None else Work(folder, 1, report, every_s)
    return train.train(program, parameters, batches, objective or Labels(), asked, work)


def test_losses_are_those_of_another_loop(directory, model, tmp_path):
    """transformers' model, torch's optimizer, every example padded to itself alone."""
    judge = transformers.LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    matrices = [p for name, p in judge.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in judge.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    expected = []
    for step in range(STEPS):
        examples = BATCHES.at(step)
        sums = []
        for example in examples:
            ids = torch.tensor([example.ids])
            logits = judge(ids[:, :-1]).logits[0]
            sums.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        loss = sum(sums) / sum(len(example.ids) - 1 for example in examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 1.8, (STEPS - step) / 3)
        adamw.step()
        adamw.zero_grad()
        expected.append(loss.item())
    found = run(model, tmp_path / "work", settings(muon=False))
    assert found.losses == pytest.approx(expected, abs=2e-4)
    assert found.losses[-1] < found.losses[0] - 0.1


def test_muon_steps_as_torchs_does():
    """In float32 here and bfloat16 there, so some percent apart."""
    random = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24), (16, 16)):
        start, gradients = torch.randn(shape, generator=random), torch.randn(3, *shape, generator=random)
        ours, theirs = (start.clone().requires_grad_() for _ in range(2))
        pair = [
            (ours, Muon([ours], lr=0.1, weight_decay=0.05)),
            (theirs, torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")),
        ]
        for gradient in gradients:
            for master, optimizer in pair:
                master.grad = gradient.clone()
                optimizer.step()
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 0.05 * moved
    made = torch.linalg.svdvals(orthogonal(torch.randn(3, 30, 20, generator=random)))
    assert made.shape == (3, 20)
    assert ((made > 0.5) & (made < 1.3)).all()


@pytest.mark.parametrize("changed", [{"together": 1}, {"together": 40}, {"recompute": True}])
def test_how_it_is_cut_changes_nothing(model, tmp_path, changed):
    whole = run(model, tmp_path / "whole")
    cut = run(model, tmp_path / "cut", settings(**changed))
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)


def test_lower_precision_learns_about_the_same(model, tmp_path):
    whole = run(model, tmp_path / "whole").losses
    low = run(model, tmp_path / "low", settings(precision="bfloat16")).losses
    assert low == pytest.approx(whole, abs=0.05)
    assert low != whole


@pytest.mark.parametrize(
    ("brand", "features", "precision"),
    [
        ("AMD EPYC", {"avx2"}, "float32"),
        ("AMD EPYC", {"avx512_bf16"}, "bfloat16"),
        ("Intel(R) Xeon(R)", {"avx512_bf16"}, "float32"),
        ("Intel(R) Xeon(R)", {"avx512_bf16", "amx_bf16"}, "bfloat16"),
    ],
)
def test_lower_precision_where_it_is_faster(brand, features, precision, monkeypatch):
    machine = hardware.detect()
    cpu = dataclasses.replace(machine.cpu, brand=brand, features=frozenset(features))
    monkeypatch.setattr(hardware, "detect", lambda: dataclasses.replace(machine, cpu=cpu))
    assert train.precision_here() == precision


def test_what_is_freed_is_kept_while_training_and_no_longer(model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(heap, "_mallopt", said.append)
    run(model, tmp_path, report=lambda step, steps, loss: said.append(step))
    kept, *steps, apart = said
    assert steps == [*range(1, STEPS + 1)]
    assert kept[-3] == 32 << 20
    assert apart[-3] == heap.LARGE


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_training_that_ended_anywhere_goes_on_to_the_same_bits(model, tmp_path, after):
    whole = run(model, tmp_path / "whole")

    def stop(step, steps, loss):
        if step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # all is written by then, or the last of it is not: every second step is kept
        run(model, tmp_path / "cut", report=stop, every_s=0.0 if after != 3 else 1e9)
    again = run(model, tmp_path / "cut")
    assert again.losses == whole.losses
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    logged = [json.loads(line) for line in (tmp_path / "cut" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(STEPS))
    assert [line["loss"] for line in logged] == whole.losses


def test_another_trainings_folder_is_refused(model, tmp_path):
    run(model, tmp_path / "work")
    mask = {"norm.weight": torch.arange(32) > 0}
    for other in ({"asked": settings(rate=0.02)}, {"batches": Batches(windows(seed=5), 4)}, {"masked": mask}):
        with pytest.raises(UserError, match="another model, text or settings"):
            run(model, tmp_path / "work", **other)
    assert run(model, tmp_path / "work").losses  # what was finished is given again


def test_minutes_become_steps_once(model, tmp_path):
    steps = []
    found = run(model, tmp_path / "work", settings(budget=Minutes(0.01)), report=lambda step, of, loss: steps.append((step, of)))
    assert len(found.losses) == steps[-1][0] == steps[0][1] > 1
    assert found.seconds < 6  # of 0.6
    untouched = run(model, tmp_path / "same", settings(budget=Steps(len(found.losses))))
    assert untouched.losses == found.losses  # what was rehearsed has taught nothing


def test_minutes_count_what_updating_takes(model, tmp_path, monkeypatch):
    whole = Optimizers.step

    def slow(self, share):
        time.sleep(0.05)
        whole(self, share)

    monkeypatch.setattr(Optimizers, "step", slow)
    assert len(run(model, tmp_path / "work", settings(budget=Minutes(0.01))).losses) <= 12  # of 0.05 s, in 0.6 s


def test_what_is_masked_stays_zero(model, tmp_path):
    name = "blocks.0.feed_forward.up.weight"
    keep = torch.rand(48, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    found = run(model, tmp_path / "work", masked={name: keep})
    assert (found.weights[name][~keep] == 0).all()
    assert (found.weights[name][keep] != 0).all()
    before = torch.tensor(np.asarray(model.weights.array(name), np.float32))
    assert not torch.equal(found.weights[name][keep], before[keep])
    assert found.losses[-1] < found.losses[0]


def test_only_answers_are_learned(model, tmp_path):
    """What stands in prompts' places as labels changes nothing; what stands in answers' does."""
    random = np.random.default_rng(3)
    ids = random.integers(0, VOCAB, (4, 16)).tolist()
    examples = tuple(Example(tuple(each), 10) for each in ids)
    (loss,) = run(model, tmp_path / "work", settings(budget=Steps(1)), Batches(examples, 4)).losses
    logits = [torch.tensor(model.logits(each[:-1])) for each in ids]
    expected = [torch.nn.functional.cross_entropy(each[9:].float(), torch.tensor(one[10:])).item() for each, one in zip(logits, ids)]
    assert loss == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_student_comes_nearer_to_its_teacher(model, tmp_path):
    asked = settings(budget=Steps(30))
    program = asked.program(model.spec, 32)
    objective = SoftLabels(Teacher(load_backend("reference").session(model, 32).score, "itself"), Soft(2.0))
    same = run(model, tmp_path / "same", settings(budget=Steps(1)), objective=objective)
    assert same.losses == pytest.approx([0.0], abs=1e-5)
    student = Plain.of(program, train.untrained(program, 0))
    found = train.train(program, student, BATCHES, objective, asked, Work(tmp_path / "student", 1))
    assert found.losses[-1] < 0.5 * found.losses[0]
    logged = [json.loads(line) for line in (tmp_path / "student" / "losses.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["soft"]) and line["labels"] > 0 for line in logged)


def test_it_says_when_it_cannot_go_on(model, tmp_path):
    with pytest.raises(UserError, match=r"the loss of step \d+ is nan; lower the learning rate"):
        run(model, tmp_path / "work", settings(rate=1e30, norm=1e30, muon=False))


def test_every_example_comes_as_often():
    batches = Batches(windows(7), 3, seed=2)
    seen = [example for step in range(14) for example in batches.at(step)]
    assert all(seen.count(example) == 6 for example in batches.examples)
    orders = {tuple(seen[begin : begin + 7]) for begin in range(0, 42, 7)}
    assert len(orders) == 6
    other = Batches(windows(7), 3, seed=3)
    assert [other.at(step) for step in range(14)] != [batches.at(step) for step in range(14)]
    assert batches.epochs(14) == 6


def test_examples_hold_every_token_of_long_documents_once():
    documents = [list(range(100)), [1], [2, 3], [], list(range(200, 234))]
    made = train.examples_of(documents, 32)
    learned = [token for example in made for token in example.ids[1:]]
    assert learned == [*range(1, 97), 3, *range(201, 233)]  # rests of three and one are too short
    assert all(len(example.ids) <= 33 for example in made)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Example((1,)), "1 tokens cannot be learned from token 1"),
        (lambda: Batches((), 4), "no text to learn from"),
        (lambda: Batches(windows(), 0), "0 examples learns nothing"),
        (lambda: settings(budget=Steps(0)), "teach nothing"),
        (lambda: settings(budget=Minutes(math.inf)), "teach nothing"),
        (lambda: settings(warmup=0.7, decay=0.5), "together they may be 1"),
        (lambda: settings(rate=0.0), "rate is 0.0"),
        (lambda: train.examples_of([], 0), "sequence is 0"),
    ],
)
def test_bad_values(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_fixed_weight_is_left(model, tmp_path):
    program = settings().program(model.spec, 32)
    with pytest.raises(ConfigError, match="nothing is no weight"):
        Plain.of(program, model.weights, ["nothing"])
    parameters = Plain.of(program, model.weights, ["embedding.weight"])
    found = train.train(program, parameters, BATCHES, Labels(), settings(), Work(tmp_path, 1))
    before = torch.tensor(np.asarray(model.weights.array("embedding.weight"), np.float32))
    assert torch.equal(found.weights["embedding.weight"], before)
    assert found.losses[-1] < found.losses[0]


def test_the_curve():
    text = train.draw_curve([4.0] * 50 + [2.0] * 50, width=10, height=4)
    lines = text.splitlines()
    assert lines[0].startswith("  4.0000 │█████")
    assert lines[3].startswith("  2.0000 │█████")
    assert lines[-1].endswith(" 100 steps")
    assert train.draw_curve([]) == ""
    assert train.draw_curve([1.0])
