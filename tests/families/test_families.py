"""Every family, third-party ones included, against an independent implementation: one generic test over each family's examples."""

import dataclasses

import numpy as np
import pytest
import torch

from hasten.backends.reference import ReferenceBackend, play, weights_of
from hasten.checkpoint import load, save
from hasten.engine import LLM, SamplingParams
from hasten.engine.stepper import Stepper
from hasten.families import all_families, find_family
from hasten.program import Batch, Precision, lower
from hasten.spec import Spec
from tests.families.oracles import make_checkpoint, read_checkpoint

LENGTH = 37
TOLERANCE = 1e-4

CASES = [(family, index) for family in all_families() for index in range(len(family.examples))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def checkpoint(request, tmp_path_factory):
    family, index = request.param
    config = family.examples[index]
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    oracle = make_checkpoint(config, directory)
    ids = np.random.default_rng(index).integers(0, config["vocab_size"], LENGTH).tolist()
    return load(directory), ids, oracle(ids), greedy(oracle, ids[:8], 6)


def greedy(oracle, ids, count):
    """The next ``count`` tokens by the oracle, each the likeliest after all before it."""
    known = list(ids)
    for _ in range(count):
        known.append(int(oracle(known)[-1].argmax()))
    return known[len(ids) :]


def steps(model, ids, cuts):
    """Logits of ``ids`` fed in the pieces that ``cuts`` leaves, state carried between them."""
    session = Stepper(ReferenceBackend().session(model, len(ids)))
    state, rows = session.start(1), []
    for begin, end in zip([0, *cuts], [*cuts, len(ids)]):
        logits, state = session.step(Batch.of([ids[begin:end]], [begin]), state)
        rows.append(logits)
    return np.concatenate(rows)


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def test_every_family_has_two_examples():
    for family in all_families():
        assert len(family.examples) >= 2, family.name
        assert {example["model_type"] for example in family.examples} == set(family.model_types), family.name


def test_logits(checkpoint):
    model, ids, expected, _ = checkpoint
    assert np.abs(expected).max() > 0.5  # an oracle near zero would agree with anything
    assert difference(model.logits(ids), expected) <= TOLERANCE


def test_the_saved_config_says_what_the_example_said(checkpoint):
    """transformers writes every default out; reading the short form must give the same Spec as reading the long one."""
    model, _, _, _ = checkpoint
    family = find_family(model.source.config["model_type"])
    specs = [family.spec(example) for example in family.examples]
    assert model.spec in specs


def test_greedy_generation(checkpoint):
    model, ids, _, expected = checkpoint
    done = LLM(model, backend="reference").generate(ids[:8], SamplingParams(max_tokens=6, ignore_eos=True))[0]
    assert list(done.token_ids) == expected


def test_logits_chunked_at_random(checkpoint):
    model, ids, _, _ = checkpoint
    whole = model.logits(ids)
    for seed in range(3):
        cuts = sorted(np.random.default_rng(seed).choice(np.arange(1, LENGTH), 7, replace=False).tolist())
        assert difference(steps(model, ids, cuts), whole) <= TOLERANCE


def test_logits_token_by_token(checkpoint):
    model, ids, _, _ = checkpoint
    assert difference(steps(model, ids, list(range(1, LENGTH))), model.logits(ids)) <= TOLERANCE


def test_sequences_in_one_batch_do_not_touch(checkpoint):
    model, ids, _, _ = checkpoint
    session = ReferenceBackend().session(model, LENGTH)
    pieces = [ids[:5], ids[3:20], ids, ids[:5]]
    together = session.score(Batch.of(pieces))
    alone = np.concatenate([session.score(Batch.of([piece])) for piece in pieces])
    assert difference(together, alone) <= TOLERANCE
    # unequal lengths with state: two sequences at different points of their lives, then one row more each
    stepper = Stepper(session)
    state = stepper.start(2)
    first, state = stepper.step(Batch.of([ids[:9], ids[:4]]), state)
    second, state = stepper.step(Batch.of([ids[9:11], ids[4:10]], [9, 4]), state)
    whole = session.score(Batch.of([ids[:11]]))
    assert difference(np.concatenate([first[:9], second[:2]]), whole) <= TOLERANCE
    assert difference(second[2:], session.score(Batch.of([ids[:10]]))[4:]) <= TOLERANCE


def test_written_back(checkpoint, tmp_path):
    model, ids, expected, _ = checkpoint
    save(model, tmp_path / "copy")
    assert difference(read_checkpoint(tmp_path / "copy")(ids), expected) <= 1e-6
    again = load(tmp_path / "copy")
    assert again.spec == model.spec
    for name in model.weights:
        assert np.array_equal(again.weights.array(name), model.weights.array(name)), name


def test_written_in_hastens_own_layout(checkpoint, tmp_path):
    model, ids, _, _ = checkpoint
    save(dataclasses.replace(model, source=None), tmp_path / "own")
    again = load(tmp_path / "own")
    for name, array in model.weights.arrays():
        assert np.array_equal(again.weights.array(name), array), name
    assert difference(again.logits(ids), model.logits(ids)) <= 1e-6  # torch's sums may depend on where a weight lies


def test_spec_round_trips(checkpoint):
    model, _, _, _ = checkpoint
    assert Spec.from_json(model.spec.to_json()) == model.spec


def test_cut_anywhere_gives_the_same(checkpoint):
    model, ids, _, _ = checkpoint
    program = lower(model.spec, context=LENGTH)
    weights = weights_of(program, model.weights)
    batch = Batch.of([ids])
    with torch.inference_mode():
        whole, _ = play(program, weights, batch)
        for layer in program.layers[:-1]:
            first, second = program.cut(layer.label)
            middle, _ = play(first, weights, batch)
            end, _ = play(second, weights, batch, given=middle)
            assert torch.equal(end["logits"], whole["logits"]), layer.label


def test_gradients_reach_every_weight(checkpoint):
    model, ids, _, _ = checkpoint
    double = Precision("float64", "float64", "float64")
    program = lower(model.spec, context=LENGTH, precision=double)
    weights = {name: w.requires_grad_() for name, w in weights_of(program, model.weights, dtype=torch.float64).items()}
    batch = Batch.of([ids])

    def loss(weights):
        logits = play(program, weights, batch)[0]["logits"]
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))

    loss(weights).backward()
    rng = np.random.default_rng(0)
    for name, weight in weights.items():
        if name.endswith("router.correction"):
            assert weight.grad is None  # it chooses, and choosing has no gradient
            continue
        assert weight.grad is not None, name
        # against a central difference in one random direction
        direction = torch.from_numpy(rng.standard_normal(weight.shape))
        direction /= direction.norm()
        with torch.no_grad():
            up, down = (loss({**weights, name: weight + sign * 1e-5 * direction}) for sign in (1, -1))
        numeric = (up - down).item() / 2e-5
        assert (weight.grad * direction).sum().item() == pytest.approx(numeric, rel=2e-4, abs=1e-7), name
