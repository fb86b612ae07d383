"""Blocks whose codes and scales learn together: nearer to what the block gave than where they began."""

import numpy as np
import pytest

from hasten.base.errors import ConfigError
from hasten.compress import block_qat
from hasten.compress.recipe import carry_out, check_recipe, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from tests.compress.models import small, windows_for


def through(listed, work, threads=1):
    model = small()
    return carry_out(model, recipe_of(listed), windows_for(model), Run(work, threads))


@pytest.mark.parametrize("weights", ["int3-g64", "int4-channel", "int4-g32-zp"])
def test_codes_and_scales_learn_and_stay_in_their_format(weights, tmp_path):
    made = through([{"block_qat": {"weights": weights, "epochs": 60, "scale_rate": 0.003}}], tmp_path / "qat")
    start = through([{"gptq": {"weights": weights, "clip": "outputs"}}], tmp_path / "gptq")
    flipped = moved = 0
    for name, weight in made.weights.items():
        if isinstance(weight, QuantizedWeight):
            assert weight.form == LinearFormat.parse(weights)
            flipped += int((weight.quantized().q != start.weights[name].quantized().q).sum())
            moved += not np.array_equal(weight.quantized().scales, start.weights[name].quantized().scales)
    assert flipped > 0
    assert moved > 0


def test_a_block_is_told_of_before_and_after(tmp_path, monkeypatch):
    seen, learn = [], block_qat.learn_block

    def told(*arguments):
        made, found = learn(*arguments)
        seen.append(found)
        return made, found

    monkeypatch.setattr(block_qat, "learn_block", told)
    through([{"block_qat": {"weights": "int3-g64", "epochs": 60, "scale_rate": 0.003}}], tmp_path)
    assert len(seen) == 2
    for found in seen:
        assert found["after"] <= found["before"]
    assert seen[0]["after"] < 0.95 * seen[0]["before"]


def test_threads_change_no_bit_and_a_killed_run_goes_on(tmp_path):
    asked = [{"block_qat": {"weights": "int3-g64"}}]
    whole, other = through(asked, tmp_path / "one"), through(asked, tmp_path / "two", threads=2)
    model = small()

    def stop(what, done, of):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(model, recipe_of(asked), windows_for(model), Run(tmp_path / "cut", 1, stop))
    again = carry_out(model, recipe_of(asked), windows_for(model), Run(tmp_path / "cut", 1))
    for name, weight in whole.weights.items():
        for one in (other, again):
            assert np.array_equal(weight.load(), one.weights[name].load()), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": "fp8"}, "learns integers"),
        ({"epochs": 0}, "epochs is 0"),
        ({"rate": -1.0}, "rate -1"),
        ({"weights": "bf16"}, "not rounded"),
    ],
)
def test_what_cannot_work_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        check_recipe(small(), recipe_of([{"block_qat": settings}]))
