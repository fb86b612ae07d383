"""Models that learn from one another: members of one training, against models that learn alone and against hand-written loops."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hasten.backends.reference import play
from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load_directory
from hasten.model import load_backend
from hasten.program import Batch
from hasten.train import (
    AttentionMaps,
    Beside,
    Follows,
    Hidden,
    Joined,
    Labels,
    Learner,
    Masked,
    Plain,
    Relations,
    Soft,
    Teacher,
    Together,
    Work,
    joined,
    of_member,
    projected,
    train,
    untrained,
)
from tests.train.small import BATCHES, settings, small_llama

ASKED = settings(norm=1e9)  # the norm of several models' gradients together is another one than each one's


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    wide = small_llama(tmp_path_factory.mktemp("wide"), layers=3, seed=1)
    narrow = small_llama(tmp_path_factory.mktemp("narrow"), layers=2, width=24, seed=2)
    return {"wide": load_directory(wide, "wide"), "narrow": load_directory(narrow, "narrow")}


def run(members, together, folder, *, fixed=(), asked=ASKED, projections=None, report=None):
    """Train ``members`` (models by name); ``projections`` are of the member called student."""
    programs = {name: asked.program(model.spec, 32) for name, model in members.items()}
    parameters = {}
    for name, model in members.items():
        arrays = dict(model.weights.arrays())
        if name == "student" and projections:
            programs[name] = projected(programs[name], projections)
            arrays |= {key: each for key, each in untrained(programs[name], 5).items() if key not in arrays}
        parameters[name] = Plain.of(programs[name], arrays, programs[name].params if name in fixed else ())
    program = joined({name: each.with_outputs(together.taps_of(name)) for name, each in programs.items()})
    work = Work(folder, 1, every_s=0.0) if report is None else Work(folder, 1, report, every_s=0.0)
    return train(program, Joined(parameters), BATCHES, together, asked, work)


def logged(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def soft(other, weight=1.0, temperature=1.0):
    return Follows("soft", weight, Soft(temperature), other if isinstance(other, tuple) else (other,))


def alone(model, folder, asked=ASKED):
    program = asked.program(model.spec, 32)
    return train(program, Plain.of(program, model.weights), BATCHES, Labels(), asked, Work(folder, 1))


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerance)


def test_members_that_do_not_look_at_each_other_learn_as_alone(models, tmp_path):
    together = Together((Learner("a", 1.0), Learner("b", 1.0)))
    found = run({"a": models["wide"], "b": models["narrow"]}, together, tmp_path / "both")
    apart = {name: alone(models[name], tmp_path / name) for name in ("wide", "narrow")}
    for member, name in (("a", "wide"), ("b", "narrow")):
        assert [line[f"{member}.labels"] for line in logged(tmp_path / "both")] == pytest.approx(apart[name].losses, abs=1e-6)
        same(of_member(member, found.weights), dict(apart[name].weights), atol=1e-5)
    assert found.losses == pytest.approx([a + b for a, b in zip(apart["wide"].losses, apart["narrow"].losses)], abs=1e-5)


def test_equal_peers_teach_each_other_nothing(models, tmp_path):
    together = Together((Learner("a", 1.0, (soft("b"),)), Learner("b", 1.0, (soft("a"),))))
    found = run({"a": models["wide"], "b": models["wide"]}, together, tmp_path / "both")
    expected = alone(models["wide"], tmp_path / "alone")
    for line, loss in zip(logged(tmp_path / "both"), expected.losses, strict=True):
        assert line["a.soft"] == pytest.approx(0, abs=1e-5)
        assert line["a.labels"] == line["b.labels"] == pytest.approx(loss, abs=1e-4)
    a, b = (of_member(name, found.weights) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    same(a, dict(expected.weights), atol=1e-3)


def test_different_peers_come_nearer_than_alone(models, tmp_path):
    asked = settings(20, norm=1e9)
    members = {"a": models["wide"], "b": models["narrow"]}
    run(members, Together((Learner("a", 1.0, (soft("b", 3.0),)), Learner("b", 1.0, (soft("a", 3.0),)))), tmp_path / "mutual", asked=asked)
    watched = Together((Learner("a", 1.0, (soft("b", 0.0),)), Learner("b", 1.0, (soft("a", 0.0),))))
    run(members, watched, tmp_path / "apart", asked=asked)
    for peer in "ab":
        mutual, apart = (sum(line[f"{peer}.soft"] for line in logged(tmp_path / name)[5:]) for name in ("mutual", "apart"))
        assert mutual < 0.8 * apart, peer


def test_a_step_is_that_of_a_hand_written_loop(models, tmp_path):
    """Two peers and a fixed teacher; one follows both others, and none moves those it follows."""
    members = {"teacher": models["wide"], "a": models["narrow"], "b": models["wide"]}
    together = Together((Learner("a", 0.3, (soft(("teacher", "b"), 0.5, 2.0),)), Learner("b", 0.8, (soft("a", 0.2),))))
    asked = settings(1, muon=False, norm=1e9, weight_decay=0.0, warmup=0.0)
    found = run(members, together, tmp_path, fixed=("teacher",), asked=asked)

    program = asked.program(models["wide"].spec, 32), asked.program(models["narrow"].spec, 32)
    weights = {name: {k: torch.tensor(np.asarray(v)).requires_grad_() for k, v in each.weights.arrays()} for name, each in members.items()}
    examples = BATCHES.at(0)
    sums = {"a": 0.0, "b": 0.0}
    for example in examples:
        logits = {
            name: play(program[name == "a"], weights[name], Batch.of([list(example.ids[:-1])]))[0]["logits"][example.learned_from - 1 :]
            for name in members
        }
        targets = torch.tensor(example.ids[example.learned_from :])

        def apart(own, other, t, logits=logits):
            q, p = F.log_softmax(logits[own] / t, -1), F.log_softmax(logits[other].detach() / t, -1)
            return t * t * (p.exp() * (p - q)).sum()

        sums["a"] += 0.3 * F.cross_entropy(logits["a"], targets, reduction="sum")
        sums["a"] += 0.5 * (apart("a", "teacher", 2.0) + apart("a", "b", 2.0)) / 2
        sums["b"] += 0.8 * F.cross_entropy(logits["b"], targets, reduction="sum") + 0.2 * apart("b", "a", 1.0)
    learned = sum(example.learned for example in examples)
    assert found.losses == pytest.approx([(sums["a"] + sums["b"]).item() / learned], rel=1e-5)
    ((sums["a"] + sums["b"]) / learned).backward()
    assert weights["teacher"]["norm.weight"].grad is None
    for name in ("a", "b"):
        optimizer = torch.optim.AdamW(weights[name].values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        moved = of_member(name, found.weights)
        for key, weight in weights[name].items():
            sure = weight.grad.abs() > 1e-4  # where a gradient is nothing, its sign is the order of sums
            np.testing.assert_allclose(moved[key][sure], weight.detach()[sure], atol=2e-4, err_msg=key)
    before = dict(models["wide"].weights.arrays())
    same(of_member("teacher", found.weights), {name: torch.tensor(np.asarray(each)) for name, each in before.items()}, atol=0)


def test_a_copy_of_its_teacher_has_nothing_to_learn(models, tmp_path):
    wide = models["wide"]
    hidden = Hidden(tuple((f"blocks.{place}.out", f"blocks.{place}.out") for place in range(3)))
    maps = AttentionMaps(tuple((f"blocks.{place}.mixer.map", f"blocks.{place}.mixer.map") for place in range(3)))
    relations = Relations((("blocks.2.mixer", "blocks.2.mixer"),), 2)
    follows = [Follows(name, 1.0, each, ("teacher",)) for name, each in (("hidden", hidden), ("maps", maps), ("relations", relations))]
    together = Together((Learner("student", 0.0, (soft("teacher"), *follows)),))
    run({"teacher": wide, "student": wide}, together, tmp_path, fixed=("teacher",), asked=settings(1))
    (line,) = logged(tmp_path)
    assert line["loss"] == pytest.approx(0, abs=1e-5)
    assert all(line[f"student.{name}"] == pytest.approx(0, abs=1e-5) for name in ("soft", "hidden", "maps", "relations"))
    assert line["student.labels"] > 4


PROJECTIONS = {"projection.0": ("blocks.0.out", 32), "projection.1": ("blocks.1.out", 32)}


def features(model):
    hidden = Hidden((("projection.0", "blocks.0.out"), ("projection.1", "blocks.2.out")))
    maps = AttentionMaps((("blocks.1.mixer.map", "blocks.2.mixer.map"),))
    relations = Relations((("blocks.1.mixer", "blocks.2.mixer"),), 2)
    follows = (Follows("hidden", 1.0, hidden, ("teacher",)), Follows("maps", 0.5, maps, ("teacher",)),
               Follows("relations", 0.5, relations, ("teacher",)))  # fmt: skip
    return Together((Learner("student", 0.1, follows),))


def test_features_of_another_width_are_learned_through_a_projection(models, tmp_path):
    members = {"teacher": models["wide"], "student": models["narrow"]}
    asked = settings(25, rate=0.02)
    found = run(members, features(models), tmp_path, fixed=("teacher",), asked=asked, projections=PROJECTIONS)
    lines = logged(tmp_path)
    for name in ("hidden", "maps", "relations"):
        assert lines[-1][f"student.{name}"] < 0.9 * lines[0][f"student.{name}"], name
    own = of_member("student", found.weights)
    assert own["projection.0.weight"].shape == (32, 24)
    begun = untrained(projected(asked.program(models["narrow"].spec, 32), PROJECTIONS), 5)
    for name in PROJECTIONS:
        assert not np.allclose(own[f"{name}.weight"], begun[f"{name}.weight"], atol=1e-3)
    assert own.keys() - set(models["narrow"].weights) == {f"{name}.weight" for name in PROJECTIONS}
    same(of_member("teacher", found.weights), {n: torch.tensor(np.asarray(a)) for n, a in models["wide"].weights.arrays()}, atol=0)


def test_a_projection_stands_beside_a_mask(models, tmp_path):
    members, asked, name = {"teacher": models["wide"], "student": models["narrow"]}, settings(4), "blocks.1.feed_forward.up.weight"
    plain = {member: asked.program(model.spec, 32) for member, model in members.items()}
    whole = projected(plain["student"], PROJECTIONS)
    keep = torch.rand(48, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    begun = untrained(dataclasses.replace(whole, params={f"{each}.weight": (32, 24) for each in PROJECTIONS}), 5)
    student = Beside(Masked(Plain.of(plain["student"], models["narrow"].weights), {name: keep}), Plain.of(whole, begun))
    assert student.matrices >= {name, "projection.0.weight", "projection.1.weight"}
    parameters = Joined({"student": student, "teacher": Plain.of(plain["teacher"], models["wide"].weights, plain["teacher"].params)})
    assert not any(master.startswith("teacher.") for master in parameters.masters)
    together = features(models)
    program = joined({"teacher": plain["teacher"].with_outputs(together.taps_of("teacher")),
                      "student": whole.with_outputs(together.taps_of("student"))})  # fmt: skip
    own = of_member("student", train(program, parameters, BATCHES, together, asked, Work(tmp_path, 1)).weights)
    assert (own[name][~keep] == 0).all()
    assert (own[name][keep] != 0).all()
    for each in PROJECTIONS:
        assert not np.allclose(own[f"{each}.weight"], begun[f"{each}.weight"], atol=1e-3)


def test_a_projection_is_a_linear_map(models):
    program = projected(settings().program(models["narrow"].spec, 32), PROJECTIONS)
    taps = ("projection.0", "blocks.0.out", "projection.1", "blocks.1.out", "logits")
    weights = {name: torch.tensor(each) for name, each in untrained(program, 0).items()}
    batch = Batch.of([[1, 2, 3], [4, 5]])
    values = play(program.with_outputs(taps), weights, batch)[0]
    for place in range(2):
        expected = values[f"blocks.{place}.out"] @ weights[f"projection.{place}.weight"].T
        np.testing.assert_allclose(values[f"projection.{place}"], expected, atol=1e-6)
    plain = settings().program(models["narrow"].spec, 32)
    assert torch.equal(play(plain, weights, batch)[0]["logits"], values["logits"])
    assert program.with_outputs(("logits",)).text() == plain.text()
    with pytest.raises(ConfigError, match="no value blocks.9.out to project"):
        projected(plain, {"p": ("blocks.9.out", 3)})


@pytest.mark.parametrize("kind", ["mutual", "features"])
def test_what_was_cut_off_goes_on_to_the_same_bits(models, tmp_path, kind):
    members = {"teacher": models["wide"], "student": models["narrow"]}
    mutual = Together((Learner("teacher", 1.0, (soft("student"),)), Learner("student", 1.0, (soft("teacher"),))))
    asked = {
        "mutual": {"together": mutual}, "features": {"together": features(models), "fixed": ("teacher",), "projections": PROJECTIONS},
    }[kind]  # fmt: skip
    whole = run(members, folder=tmp_path / "whole", **asked)

    def stop(step, steps, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(members, folder=tmp_path / "cut", report=stop, **asked)
    assert len(logged(tmp_path / "cut")) == 3
    again = run(members, folder=tmp_path / "cut", **asked)
    assert again.losses == whole.losses
    assert len(again.losses) == 6
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    keys = [{name: value for name, value in line.items() if name != "seconds"} for line in logged(tmp_path / "cut")]
    assert keys == [{name: value for name, value in line.items() if name != "seconds"} for line in logged(tmp_path / "whole")]


@pytest.mark.parametrize("changed", [{"recompute": True}, {"together": 20}])
def test_how_it_is_cut_changes_nothing(models, tmp_path, changed):
    members = {"teacher": models["wide"], "student": models["narrow"]}
    asked = {"fixed": ("teacher",), "projections": PROJECTIONS}
    whole = run(members, features(models), tmp_path / "whole", asked=settings(3), **asked)
    cut = run(members, features(models), tmp_path / "cut", asked=settings(3, **changed), **asked)
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)


def test_another_teacher_is_another_training(models, tmp_path):
    """A teacher that is fixed is no master, and counts all the same."""
    together = Together((Learner("student", 0.0, (soft("teacher"),)),))
    members = {"teacher": models["wide"], "student": models["narrow"]}
    run(members, together, tmp_path, fixed=("teacher",), asked=settings(1))
    weights = dict(models["wide"].weights)
    changed = np.asarray(weights["norm.weight"].load()) * 1.5
    other = dataclasses.replace(models["wide"], weights=type(models["wide"].weights)(weights | {"norm.weight": dataclasses.replace(
        weights["norm.weight"], load=lambda: changed)}))  # fmt: skip
    with pytest.raises(UserError, match="another model, text or settings"):
        run(members | {"teacher": other}, together, tmp_path, fixed=("teacher",), asked=settings(1))
    with pytest.raises(UserError, match="another model, text or settings"):
        run(members, Together((Learner("student", 0.0, (soft("teacher", 2.0),)),)), tmp_path, fixed=("teacher",), asked=settings(1))


@pytest.mark.parametrize(("backend", "apart"), [("reference", 1e-5), ("cpu", 1e-2)])
def test_a_teacher_outside_teaches_what_one_inside_does(models, tmp_path, backend, apart):
    """Of whatever plays it: the same losses as where it is a member that is fixed, though it is not in the Program."""
    learner = Learner("student", 0.3, (soft("teacher", 2.0, 2.0),))
    played: list[Batch] = []

    def score(batch):
        played.append(batch)
        return session.score(batch)

    session = load_backend(backend).session(models["wide"], 32)
    inside = run({"teacher": models["wide"], "student": models["narrow"]}, Together((learner,)), tmp_path / "inside", fixed=("teacher",))
    together = Together((learner,), {"teacher": Teacher(score, backend)})
    assert not together.taps_of("teacher")
    outside = run({"student": models["narrow"]}, together, tmp_path / "outside")
    assert played
    assert outside.losses == pytest.approx(inside.losses, abs=apart)
    for one, other in zip(logged(tmp_path / "inside"), logged(tmp_path / "outside"), strict=True):
        assert other["student.soft"] == pytest.approx(one["student.soft"], abs=apart)
    for name, before in models["narrow"].weights.arrays():
        one, other = (torch.as_tensor(found.weights[f"student.{name}"]) - torch.tensor(before) for found in (inside, outside))
        assert float(F.cosine_similarity(one.flatten(), other.flatten(), 0)) > 0.95, name
    with pytest.raises(UserError, match="another model, text or settings"):
        run({"student": models["narrow"]}, Together((learner,), {"teacher": Teacher(score, "another")}), tmp_path / "outside")


def test_a_student_may_learn_from_features_alone(models, tmp_path):
    """What it says is logged and moves nothing: the head gets no gradient."""
    hidden = Follows("hidden", 1.0, Hidden((("blocks.0.out", "blocks.1.out"),)), ("teacher",))
    asked = settings(4, weight_decay=0.0)
    together = Together((Learner("student", 0.0, (hidden,)),))
    found = run({"teacher": models["wide"], "student": models["wide"]}, together, tmp_path, fixed=("teacher",), asked=asked)
    assert all(line["student.labels"] > 0 and line["loss"] == pytest.approx(line["student.hidden"]) for line in logged(tmp_path))
    before = dict(models["wide"].weights.arrays())
    assert np.array_equal(found.weights["student.head.weight"], before["head.weight"])
    assert not np.array_equal(found.weights["student.blocks.0.feed_forward.up.weight"], before["blocks.0.feed_forward.up.weight"])


def test_a_teacher_outside_is_not_looked_into():
    hidden = Follows("hidden", 1.0, Hidden((("blocks.0.out", "blocks.0.out"),)), ("teacher",))
    with pytest.raises(ConfigError, match="hidden looks into teacher, of whom only logits are there"):
        Together((Learner("student", 1.0, (hidden,)),), {"teacher": Teacher(lambda batch: np.zeros((1, 1), np.float32), "none")})


def test_only_what_is_asked_of_a_teacher_is_played(models):
    together = Together((Learner("student", 1.0, (Follows("hidden", 1.0, Hidden((("blocks.0.out", "blocks.0.out"),)), ("teacher",)),)),))
    assert together.taps_of("teacher") == ("blocks.0.out",)
    program = settings().program(models["wide"].spec, 32)
    both = joined({name: program.with_outputs(together.taps_of(name)) for name in ("teacher", "student")})
    assert [layer.label for layer in both.layers if layer.label.startswith("teacher.")] == ["teacher.embedding", "teacher.blocks.0"]
    with pytest.raises(ConfigError, match="join it before it is cut"):
        joined({"a": program.cut("blocks.0")[1]})


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        (Learner("a"), "a learns from nothing"),
        (Learner("a", 0.0, (Follows("soft", 0.0, Soft(), ("b",)),)), "a learns from nothing"),
        (Learner("a", 1.0, (Follows("soft", -1.0, Soft(), ("b",)),)), "a weight below 0"),
    ],
)
def test_bad_weights(learner, said):
    with pytest.raises(ConfigError, match=said):
        Together((learner,))
