"""What SamplingParams accept, refuse and normalise. What they mean is in test_sampler.py."""

import dataclasses
import math

import numpy as np
import pytest

from hasten.base.errors import ConfigError
from hasten.engine.grammar import Grammar
from hasten.engine.sampling import SamplingParams


def test_stop_is_normalised_and_params_are_values():
    assert SamplingParams(max_tokens=5, stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))
    assert hash(SamplingParams(stop=["a"], stop_token_ids=[1])) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 3
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_numbers_of_numpy_become_pythons():
    given = {field: np.float32(0.5) for field in ("temperature", "top_p", "min_p", "repetition_penalty")}
    given |= {"presence_penalty": np.float64(0.5), "frequency_penalty": np.int8(1), "seed": np.uint64(7), "top_k": np.int64(3)}
    params = SamplingParams(**given, max_tokens=np.int32(9), min_tokens=np.uint8(2), stop_token_ids=[np.int64(4), 5])
    assert params == SamplingParams(
        temperature=0.5, top_p=0.5, min_p=0.5, repetition_penalty=0.5, presence_penalty=0.5, frequency_penalty=1, seed=7, top_k=3,
        max_tokens=9, min_tokens=2, stop_token_ids=(4, 5),
    )  # fmt: skip
    for field, value in dataclasses.asdict(params).items():
        for each in value if isinstance(value, tuple) else [value]:
            assert type(each) in {int, float, bool, type(None)}, field
    for field in NUMBERS:
        for bad in (np.float64("nan"), np.float32("inf"), np.bool_(True), np.int64(-3), np.array([1]), np.complex128(1)):
            with pytest.raises(ConfigError, match=f"^{field} is ") as caught:
                SamplingParams(**{field: bad})
            assert "\n" not in str(caught.value)
            assert "np." not in str(caught.value)


REALS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
NUMBERS = [*REALS, "max_tokens", "min_tokens", "top_k", "seed"]
BAD = [math.nan, math.inf, -math.inf, -3, 2**63, -(2**63), 10**6000, True, "1", [1], [0] * 10**6, {}, b"1", 1j]


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_refuses_what_it_cannot_mean(field):
    for value in [*BAD, *([] if field == "seed" else [None])]:
        with pytest.raises(ConfigError) as caught:
            SamplingParams(**{field: value})
        text = str(caught.value)
        assert text.startswith(f"{field} is ")
        assert "give a" in text
        assert len(text) < 250
        assert "\n" not in text


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ignore_eos", [0, 1, None, "true"]),
        ("stop", ["", [""], 5, None, [1], ["a", None], ["x" * 1025], ["a"] * 65, [["a"]], {"a"}, "x" * 10**6]),
        ("stop_token_ids", [5, None, [-1], [2**63], [True], [1.0], ["1"], "12", [10**6000], [0] * 10**6]),
        ("logit_bias", [5, "x", None, [1], [(1,)], [(1, 2, 3)], dict.fromkeys(range(1025), 0)]),
        ("logprobs", [-1, 129, 1.0, True, 2**63]),
        ("prompt_logprobs", [-1, 129, "1"]),
        ("n", [0, 65, None, 1.0, 2**63]),
        ("best_of", [0, 65, 1.5]),
        ("echo", [0, None]),
        ("grammar", ["[a-z]", 5]),
        ("beam", [4, {"width": 4}]),
        ("max_tokens", [0, 1.0, 2**31]),
        ("min_tokens", [129, 1.0]),
        ("top_k", [-1, 0.5]),
        ("top_p", [-1e-9, 1 + 1e-9]),
        ("repetition_penalty", [0, 0.0, 100.1]),
        ("presence_penalty", [2.1, -2.1]),
        ("temperature", [-1e-9, 101]),
    ],
)
def test_boundaries_refused(field, values):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            SamplingParams(**{field: value})
        assert str(caught.value).startswith(field)
        assert len(str(caught.value)) < 450
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "field"),
    [
        ({-1: 0}, "a token id of logit_bias"), ({2**31: 0}, "a token id of logit_bias"), ({"1": 0}, "a token id of logit_bias"),
        ({3: 101}, "logit_bias of token 3"), ({3: math.nan}, "logit_bias of token 3"), ([(3, -math.inf)], "logit_bias of token 3"),
    ],
)  # fmt: skip
def test_biases_refused(bias, field):
    with pytest.raises(ConfigError, match=f"^{field} is "):
        SamplingParams(logit_bias=bias)


def test_what_does_not_go_together():
    assert SamplingParams(logit_bias={5: 1, 2: -3}).logit_bias == ((2, -3.0), (5, 1.0))
    with pytest.raises(ConfigError, match="^best_of is 2: give a whole number from 3"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(ConfigError, match="^ignore_eos is true with a grammar"):
        SamplingParams(ignore_eos=True, grammar=Grammar.regex("a"))
    assert SamplingParams(n=2, best_of=5).choices == 5


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 1}, {"max_tokens": 2**31 - 1}, {"temperature": 2}, {"temperature": 100.0}, {"top_p": 0}, {"top_p": 1}, {"min_p": 1},
        {"presence_penalty": -2}, {"frequency_penalty": 2.0}, {"seed": 0}, {"seed": 2**63 - 1}, {"min_tokens": 128}, {"stop": []},
        {"stop_token_ids": [0, 2**31 - 1]}, {"ignore_eos": True}, {"top_k": 2**31 - 1},
    ],
    ids=str,
)  # fmt: skip
def test_boundaries_accepted(given):
    assert SamplingParams(**given)
