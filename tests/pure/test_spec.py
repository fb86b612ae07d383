"""Spec: JSON there and back for any Spec, and every wrong one refused with a line that names what is wrong."""

import json
import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.spec import (
    MLP,
    Alibi,
    CrossLayerAttention,
    Exit,
    Head,
    LearnedPositions,
    LongRope,
    Mamba2,
    MixtureOfExperts,
    PerPair,
    RelativeSinusoid,
    RMSNorm,
    Rotary,
    Router,
    Spec,
)
from tests.pure.specs import FEED_FORWARDS, MIXERS, RMS, ROPE, SPECS, attention, block, moe, spec_of, specs

LONG = LongRope(short_factor=(1.0,), long_factor=(2.0,), original_context=4, attention_factor=1.0)


@given(specs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_json_round_trips(spec):
    text = spec.to_json()
    again = Spec.from_json(text)
    assert again == spec
    assert again.to_json() == text
    assert Spec.from_data(json.loads(text)) == spec
    assert spec.checked() == spec


@pytest.mark.parametrize("name", SPECS)
def test_json_says_kinds_and_schema(name):
    data = json.loads(SPECS[name].to_json())
    assert data["kind"] == "spec"
    assert data["schema_version"] == 1
    assert all(part is None or "kind" in part for block in data["blocks"] for part in block.values() if not isinstance(part, str))


def test_specs_are_frozen_and_hashable():
    spec = spec_of()
    assert hash(spec) == hash(spec_of())
    with pytest.raises(AttributeError):
        spec.width = 9


def changed(path, value):
    """The JSON of a small Spec with one field set."""
    data = json.loads(spec_of(block(feed_forward="moe")).to_json())
    *way, last = path
    at = data
    for step in way:
        at = at[step]
    at[last] = value
    return json.dumps(data)


@pytest.mark.parametrize("version", [2, 3, 1000])
def test_a_newer_schema_is_refused(version):
    with pytest.raises(UnsupportedError, match=rf"schema_version {version} .*upgrade"):
        Spec.from_json(changed(["schema_version"], version))
    with pytest.raises(UnsupportedError, match="upgrade"):
        spec_of(schema_version=version)
    # whatever else a newer file says must not be what is complained about
    with pytest.raises(UnsupportedError, match="upgrade"):
        Spec.from_data({"schema_version": version, "shape": "unheard of"})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("RMSNorm.eps", lambda x: RMSNorm(eps=x)),
        ("Attention.scale", lambda x: attention(scale=x)),
        ("Attention.softcap", lambda x: attention(softcap=x)),
        ("Alibi.slopes", lambda x: Alibi(slopes=(0.5, x))),
        ("LongRope.long_factor", lambda x: LongRope(short_factor=(1.0,), long_factor=(x,), original_context=4, attention_factor=1.0)),
        ("Mamba2.dt_max", lambda x: Mamba2(heads=1, head_dim=1, state=1, groups=1, conv=1, norm=RMS, dt_max=x)),
        ("Head.scale", lambda x: Head(tied=True, scale=x)),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(name, build, number):
    with pytest.raises(ConfigError, match=rf"{name} .*{number}.* finite"):
        build(number)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_json_beyond_the_standard_is_refused(word):
    text = spec_of().to_json().replace(b'"scale": 1.0', f'"scale": {word}'.encode())
    assert word.encode() in text
    with pytest.raises(ConfigError, match="not valid JSON"):
        Spec.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["witdh"], 8, "witdh"),
        (["blocks", 0, "mixer", "rotary_base"], 1e4, "rotary_base"),
        (["blocks", 0, "mixer", "kind"], "hyena", "hyena"),
        (["width"], 0, "width"),
        (["width"], "8", "width"),
        (["vocab"], 2.5, "vocab"),
        (["norm", "eps"], -1e-6, "eps"),
        (["blocks", 0, "mixer", "scale"], 0, "scale"),
        (["blocks", 0, "mixer", "position", "dims"], 3, "dims"),
        (["blocks", 0, "feed_forward", "expert", "activation"], "swish", "activation"),
        (["residual"], "int8", "residual"),
        (["head"], None, "head"),
        (["blocks"], [], "one block"),
        (["blocks", 0], {"kind": "block", "mixer": None, "feed_forward": None, "wiring": {"kind": "pre_norm"}}, "wiring"),
    ],
)
def test_a_wrong_field_is_refused_by_name(path, value, said):
    with pytest.raises(ConfigError) as caught:
        Spec.from_json(changed(path, value))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"spec"', b"\xff\xfe", "[" * 5000, '{"kind": "spec"}'])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(ConfigError, match="^Spec: "):
        Spec.from_json(text)


def missing_field():
    data = json.loads(spec_of().to_json())
    del data["width"]
    return Spec.from_data(data)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: attention(kv_heads=3), "4 attention heads cannot share 3"),
        (lambda: attention(position=Rotary(base=1e4, dims=6)), "rotary dims 6 exceed the head dimension 4"),
        (lambda: attention(position=Alibi(slopes=(0.5,))), "1 ALiBi slopes for 4 heads"),
        (lambda: attention(position=RelativeSinusoid()), "as many key/value heads as heads"),
        (lambda: attention(position=RelativeSinusoid(), kv_heads=4, value_dim=3), "values as wide as keys"),
        (lambda: attention(position=RelativeSinusoid(), kv_heads=4, sinks=True), "sinks"),
        (lambda: attention(position=RelativeSinusoid(), kv_heads=4, softcap=1.0), "softcap"),
        (lambda: spec_of(block("relative"), width=9), "width 9 is odd"),
        (lambda: msgspec.structs.replace(MIXERS["latent"], rope_dim=2), "rotary dims 4 exceed the 2"),
        (lambda: LearnedPositions(count=2, offset=2), "a table of 2 positions has none left"),
        (lambda: Rotary(base=1e4, dims=5), "even"),
        (lambda: Rotary(base=1e4, dims=4, scaling=LONG), "1 LongRope factors for 2"),
        (lambda: LongRope(short_factor=(1.0,), long_factor=(), original_context=4, attention_factor=1.0), "1 short and 0 long"),
        (lambda: Mamba2(heads=3, head_dim=1, state=1, groups=2, conv=1, norm=RMS), "3 Mamba-2 heads cannot share 2"),
        (lambda: msgspec.structs.replace(MIXERS["delta"], key_heads=3), "4 value heads cannot share 3"),
        (lambda: msgspec.structs.replace(MIXERS["linear"], kv_heads=3), "4 linear heads cannot share 3"),
        (lambda: msgspec.structs.replace(MIXERS["linear"], head_dim=3), "rotary dims 4 exceed the head dimension 3"),
        (lambda: moe(top_k=5), "5 experts per token"),
        (lambda: moe(Router(groups=3)), "cannot be split into 3 groups"),
        (lambda: moe(Router(groups=2, top_groups=3)), "3 groups are to be picked of 2"),
        (lambda: moe(Router(groups=4, top_groups=1)), "chosen groups hold fewer"),
        (lambda: block(mixer=None, feed_forward=None), "a mixer, a feed-forward, or both"),
        (lambda: spec_of(exits=(Exit(after=1, norm=RMS, head=Head(tied=True)),)), "not early"),
        (missing_field, "width"),
        (lambda: Rotary(base=10.0, dims=4, scaling=PerPair(divisors=(1.0,))), "1 divisors for 2 frequencies"),
        (lambda: CrossLayerAttention(attention=attention(k_norm=RMS), source=0), "none of its own to normalize"),
        (lambda: CrossLayerAttention(attention=MIXERS["relative"], source=0), "do not go with another block's keys"),
        (lambda: spec_of(block(CrossLayerAttention(attention=attention(), source=0))), "block 0 reads keys and values of block 0"),
        (lambda: spec_of(block("mamba"), block(CrossLayerAttention(attention=attention(), source=0))), "no earlier one with"),
        (lambda: spec_of(block("window"), block(CrossLayerAttention(attention=attention(), source=0))), "no earlier one with"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


def test_checked_enforces_what_constructors_do_not():
    wrong = MLP(hidden=-3, activation="silu")  # a constructor alone takes any number
    with pytest.raises(ConfigError, match="hidden"):
        spec_of(block(feed_forward=wrong)).checked()


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=4)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner)))
@settings(max_examples=60, deadline=None)
def test_any_other_json_is_a_config_error(data):
    with pytest.raises(ConfigError):
        Spec.from_data(data)


def test_every_kind_is_in_the_examples():
    blocks = (block for spec in SPECS.values() for block in spec.blocks)
    seen = {type(part).__name__ for block in blocks for part in (block.mixer, block.feed_forward) if part is not None}
    attentions = {"Attention", "CrossLayerAttention", "LatentAttention", "LinearAttention"}
    assert seen == {*attentions, "Mamba", "Mamba2", "GatedDeltaNet", "MLP", "GatedMLP", "MixtureOfExperts"}
    assert isinstance(FEED_FORWARDS["moe"], MixtureOfExperts)
    assert attention().position == ROPE
