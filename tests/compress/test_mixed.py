"""Bits by layer: the choice against trying all, the sensitivity against the model itself, the whole against being cut off anywhere."""

import itertools
import json

import msgspec
import numpy as np
import pytest
import torch

from hasten.backends.reference import play
from hasten.base.errors import ConfigError, MissingExtraError, UserError
from hasten.checkpoint import load, save
from hasten.checkpoint.quantized.writing import stored_bytes, stored_tensors
from hasten.compress import budget
from hasten.compress.budget import GAP, least_cost
from hasten.compress.data import text_of
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.rounding import Rtn
from hasten.compress.sensitivity import divergences
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, Precision, lower
from tests.cli import main
from tests.compress.models import KINDS, small, windows_for

# --- the choice


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_costs_less(seed):
    random = np.random.default_rng(seed)
    costs = [sorted(random.lognormal(-8, 2, 3), reverse=True) for _ in range(6)]
    sizes = [sorted(random.integers(10, 1000, 3).tolist()) for _ in range(6)]
    budgets = np.linspace(sum(map(min, sizes)), sum(map(max, sizes)), 5).astype(int)
    every = list(itertools.product(range(3), repeat=6))
    for budget_of in budgets.tolist():
        picked = least_cost(costs, sizes, budget_of)
        taken = sum(size[index] for size, index in zip(sizes, picked))
        best = min(
            sum(cost[index] for cost, index in zip(costs, each))
            for each in every
            if sum(size[index] for size, index in zip(sizes, each)) <= budget_of
        )
        assert taken <= budget_of
        assert sum(cost[index] for cost, index in zip(costs, picked)) <= best * (1 + GAP) + 1e-15


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(ConfigError, match="cannot be met; these choices take 30 to 70"):
        least_cost([[2.0, 1.0], [2.0, 1.0]], [[10, 30], [20, 40]], 29)
    with pytest.raises(ConfigError, match="not a finite number"):
        least_cost([[float("nan"), 1.0]], [[10, 30]], 50)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"hasten\[search\]"):
        budget.least_cost([[1.0]], [[1]], 1)


# --- sensitivity


def errors_of(model, share, seed=0):
    """For each product two random errors, the second twice the first."""
    random, found = np.random.default_rng(seed), {}
    for name, weight in model.weights.items():
        if name.startswith("blocks.") and len(weight.shape) > 1 and "router" not in name:
            error = share * np.std(weight.load()) * random.standard_normal(weight.shape).astype(np.float32)
            found[name] = [torch.from_numpy(error), torch.from_numpy(2 * error)]
    return found


def measured(model, errors, text, work, threads=2):
    return divergences(model, Rtn(), errors, lambda name, weight, moments: errors[name], text, Run(work, threads))


@pytest.mark.parametrize("kind", KINDS)
def test_going_back_block_by_block_gives_the_gradients_of_the_whole(kind, tmp_path):
    model, text = small(kind), None
    text = windows_for(model)
    errors = errors_of(model, 0.05)
    found = measured(model, errors, text, tmp_path)
    assert found.keys() == errors.keys()
    program = lower(model.spec, context=text.longest, precision=Precision())
    weights = {name: torch.from_numpy(np.array(model.weights.array(name), np.float32)) for name in program.params}
    leaves = {name: weights[name].requires_grad_() for name in errors}
    expected = dict.fromkeys(errors, 0.0)
    for index, window in enumerate(text.windows):
        logits = play(program, weights, Batch.of([window]))[0]["logits"]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(index))
        likelihood = logits.log_softmax(-1).gather(1, drawn).sum()
        gradients = torch.autograd.grad(likelihood, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients):
            expected[name] += 0 if gradient is None else float((gradient * errors[name][0]).sum()) ** 2 / 2 / text.tokens
    for name, (one, twice) in found.items():
        assert one == pytest.approx(expected[name], rel=2e-3, abs=1e-12)
        assert twice == pytest.approx(4 * one, rel=1e-5)


def test_it_estimates_the_divergence(tmp_path):
    """Its spread over so many windows is √(2 / 100), 14 %; four times that for each, and once for all together."""
    model = small()
    text = windows_for(model, lengths=(12,) * 100)
    errors = errors_of(model, 0.05)
    found = measured(model, errors, text, tmp_path)
    program = lower(model.spec, context=text.longest, precision=Precision())
    weights = {name: torch.from_numpy(np.array(model.weights.array(name), np.float32)) for name in program.params}
    batch = Batch.of(text.windows)

    def chances(weights):
        return play(program, weights, batch)[0]["logits"].double().log_softmax(-1)

    plain, ratios = chances(weights), []
    for name, (error, _) in errors.items():
        moved = chances({**weights, name: weights[name] + error})
        ratios.append(found[name][0] / float((plain.exp() * (plain - moved)).sum(-1).mean()))
    assert 0.44 < min(ratios) <= max(ratios) < 1.57
    assert np.mean(ratios) == pytest.approx(1, abs=0.14)


# --- the whole


def through(model, settings, work, text=None, threads=2, report=lambda doing, done, of: None):
    text = text or windows_for(model, lengths=(30, 7, 24))
    return carry_out(model, recipe_of([{"mixed": settings}]), text, Run(work, threads, report))


def forms_of(model):
    return {name: str(weight.form) for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}


def bits_of(model):
    """As they would be in files."""
    stored = {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantizedWeight)}
    parts = stored_tensors(stored)
    total = sum(part.load().nbytes for name, part in parts.items() if not name.endswith("_shape"))
    return 8 * total / sum(weight.size for weight in stored.values())


SETTINGS = {"bits": 4.6, "choices": ["int2-g32", "int3-g32", "int4-g32", "int8-g32"], "clip": "none", "method": "rtn"}


@pytest.mark.parametrize(("kind", "method"), [("grouped-query", "gptq"), ("multi-query", "rtn"), ("MoE", "rtn")])
def test_every_layer_takes_one_of_the_choices_within_the_budget(kind, method, tmp_path):
    model = small(kind)
    made = through(model, {**SETTINGS, "method": method}, tmp_path / "work")
    forms = forms_of(made)
    assert len(forms) == 14
    assert set(forms.values()) <= set(SETTINGS["choices"])
    assert len(set(forms.values())) > 1
    (step,) = made.provenance
    assert {name: each["weights"] for name, each in step.evidence["chosen"].items()} == forms
    assert step.evidence["bits"] == pytest.approx(bits_of(made), rel=1e-12)
    assert 4.4 < bits_of(made) <= 4.6
    assert step.evidence["expected_kl"] < step.evidence["expected_kl_uniform"]["int3-g32"]
    for name in made.weights.keys() - forms.keys():
        assert made.weights[name] is model.weights[name]
    save(made, tmp_path / "saved")
    read = load(str(tmp_path / "saved"))
    assert forms_of(read) == forms
    for name, weight in made.weights.items():
        assert np.array_equal(weight.load(), read.weights.array(name)), name
    assert msgspec.json.encode(read.provenance) == msgspec.json.encode(made.provenance)


def test_what_matters_more_is_given_more(tmp_path):
    """One block's products are made to matter little: what they give is scaled down."""
    model = small()
    weights = dict(model.weights)
    for name in ("blocks.0.mixer.o.weight", "blocks.0.feed_forward.down.weight"):
        array = weights[name].load() * np.float32(1e-3)
        weights[name] = Weight(array.shape, array.dtype, lambda array=array: array)
    forms = forms_of(through(type(model)(name="m", spec=model.spec, weights=Weights(weights)), {**SETTINGS, "method": "rtn"}, tmp_path))
    bits = {name: LinearFormat.parse(form).bits for name, form in forms.items()}
    first, second = (np.mean([each for name, each in bits.items() if name.startswith(f"blocks.{index}.")]) for index in (0, 1))
    assert first + 1 < second


def test_what_reads_one_value_takes_one_format_where_asked(tmp_path):
    forms = forms_of(through(small(), {**SETTINGS, "method": "rtn", "unit": "input"}, tmp_path))
    for index in (0, 1):
        for names in (("mixer.q", "mixer.k", "mixer.v"), ("feed_forward.gate", "feed_forward.up")):
            assert len({forms[f"blocks.{index}.{name}.weight"] for name in names}) == 1
    assert len(set(forms.values())) > 1


def test_threads_change_no_bit(tmp_path):
    model = small("MoE")
    one, other = (through(model, SETTINGS, tmp_path / str(threads), threads=threads) for threads in (1, 3))
    same(one, other)


def same(one, other):
    assert forms_of(one) == forms_of(other)
    assert one.provenance == other.provenance
    for name, weight in one.weights.items():
        assert np.array_equal(weight.load(), other.weights.array(name)), name


class Killed(Exception):
    pass


def test_cut_off_anywhere_it_goes_on_to_the_same_bits(tmp_path):
    model, told = small(), []
    whole = through(model, SETTINGS, tmp_path / "whole", report=lambda *each: told.append(each))
    assert sum("sensitivity" in doing for doing, _, _ in told) == 2
    for stop in range(len(told)):
        left = iter(range(stop))

        def report(*each, left=left):
            if next(left, None) is None:
                raise Killed

        with pytest.raises(Killed):
            through(model, SETTINGS, tmp_path / str(stop), report=report)
        again = []
        same(whole, through(model, SETTINGS, tmp_path / str(stop), report=lambda *each, again=again: again.append(each)))
        assert told[stop] in again
        assert len(again) <= len(told) - max(0, stop - 3) + (stop > 3)  # blocks that were finished are not done again
    done = [path.name for path in (tmp_path / "whole").rglob("*") if path.is_dir()]
    assert not any(name.startswith(("live", "grad", ".")) for name in done)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 2.0}, r"bits is 2\.0; with int2, int3, int4, int8, 2\.\d+ to 8\.\d+ a weight"),
        ({"bits": 9.0}, r"2\.\d+ to 8\.\d+ a weight can be met"),
        ({"bits": 3.5, "choices": []}, "no choices"),
        ({"bits": 3.5, "choices": ["int5"]}, "int5"),
        ({"bits": 3.5, "choices": ["int3", "bf16"]}, "not rounded to"),
        ({"bits": 8.0, "choices": ["int4", "fp8"], "activations": "int8"}, "do not go with"),
        ({"bits": 3.5, "method": "rtn", "descend": 2}, "descend"),
        ({"bits": 3.5, "measure": 0}, "at least 1 window"),
        ({"bits": 3.5, "skip": ["*"]}, "every layer is skipped"),
        ({}, "missing required field `bits`"),
    ],
)
def test_what_cannot_work_is_refused(settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        check_recipe(small(), recipe_of([{"mixed": settings}]))


@pytest.mark.parametrize("form", ["int8", "int4", "int3-g64-zp", "int2-g32-zp", "int4-channel-zp", "fp8"])
def test_bytes_are_those_of_the_tensors(form):
    parsed, random = LinearFormat.parse(form), np.random.default_rng(0)
    for shape in ((48, 96), (16, 160)):
        parts = stored_tensors({"w.weight": QuantizedWeight.from_array(random.normal(size=shape).astype(np.float32), parsed)})
        assert stored_bytes(shape, parsed) == sum(part.load().nbytes for name, part in parts.items() if not name.endswith("_shape"))


def test_the_command_chooses_tells_and_keeps_what_it_chose(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (tmp_path / "text").write_text("def double(x):\n    return 2 * x\n" * 20)
    text = ["--text", tmp_path / "text", "--held-out", tmp_path / "text"]
    quick = ["--samples", "2", "--sequence", "32", "--gate-tokens", "200", "--even-if-worse", "--skip", "blocks.[2-7].*", *text]
    done = main(monkeypatch, capsys, "quantize", "code-8m", out, "--bits", "5", "--weights", "int4,int8", "--method", "rtn", *quick)
    assert done.code == 0, done.err
    assert "bits a weight, chosen by layer" in done.out
    table = [line.split() for line in done.out.splitlines() if line.strip().startswith(("blocks.0", "blocks.1"))]
    assert {form for _, *forms in table for form in forms} == {"int4", "int8"}
    read = load(str(out))
    assert [forms_of(read)[f"blocks.{index}.mixer.q.weight"] for index in (0, 1)] == [row[1] for row in table]
    shown = main(monkeypatch, capsys, "inspect", out)
    assert [line.split() for line in shown.out.splitlines() if line.strip().startswith(("blocks.0", "blocks.1"))] == table
    facts = json.loads(main(monkeypatch, capsys, "inspect", out, "--json").out)
    assert facts["provenance"][0]["evidence"]["chosen"].keys() == forms_of(read).keys()
    refused = main(monkeypatch, capsys, "quantize", "code-8m", tmp_path / "o", "--bits", "5", "--method", "awq", *quick)
    assert refused.code == 2
    assert "rtn, gptq" in refused.err


def test_more_windows_than_are_measured_on_are_used_for_rounding(tmp_path):
    model = small()
    text = windows_for(model, lengths=(30, 7, 24))
    fewer = text_of(text.name, text.windows[:2])
    made = through(model, {**SETTINGS, "measure": 2}, tmp_path / "one", text)
    assert made.provenance[0].evidence["windows"] == len(text.windows)
    other = through(model, {**SETTINGS, "measure": 2}, tmp_path / "two", fewer)
    assert made.provenance[0].evidence["chosen"] == other.provenance[0].evidence["chosen"]
