"""Lowering and Programs: what is printed, tapped, cut, cast and kept, over small Specs of every kind. tests/ops plays them."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.program import (
    OPS,
    Batch,
    KvGroup,
    LatentGroup,
    LinearFormats,
    Precision,
    RecurrentGroup,
    StateRef,
    lower,
    oldest_visible,
    ops,
    token_array,
)
from hasten.program.program import find_ops
from hasten.program.rotary import rotary_frequencies
from hasten.spec import Causal, LinearScaling, Llama3Scaling, LongRope, Rotary, SegmentMemory, SlidingWindow, Yarn
from tests.pure.specs import ROPE, SPECS, attention, block, spec_of, specs

EVERY = pytest.mark.parametrize("name", SPECS)


def check(program):
    """What holds for every Program there is."""
    made = set(program.inputs)
    for op in program.ops:
        assert set(op.inputs) <= made, f"{type(op).__name__} reads {set(op.inputs) - made} before it is made"
        assert not made & set(op.outputs), f"{op.outputs} is made twice"
        made |= set(op.outputs)
        assert set(op.params) <= program.params.keys()
        for ref in op.state_refs:
            assert 0 <= ref.slot < program.state(ref.group).layers
    assert set(program.outputs) <= made
    assert made == set(program.values)
    assert set(program.params) == {name for op in program.ops for name in op.params}
    assert all(size > 0 for shape in program.params.values() for size in shape)
    assert {group.name for group in program.states} == {ref.group for op in program.ops for ref in op.state_refs}
    begins = [layer.start for layer in program.layers] + [len(program.ops)]
    assert begins == [0] + [layer.stop for layer in program.layers]
    assert len({layer.label for layer in program.layers}) == len(program.layers)


# --- lowering


@EVERY
def test_lowered_programs_are_whole(name):
    spec = SPECS[name]
    program = lower(spec)
    check(program)
    assert program.context == spec.context
    assert program.inputs == ()
    assert program.outputs[0] == "logits"
    assert [layer.label for layer in program.layers if layer.label.startswith("blocks")] == [f"blocks.{i}" for i in range(len(spec.blocks))]
    assert (program.layers[0].label, program.layers[-1].label) == ("embedding", "head")


@EVERY
def test_lowering_is_a_function(name):
    assert lower(SPECS[name]) == lower(SPECS[name])


def test_every_op_is_lowered_to_by_some_spec_or_made_by_a_pass():
    used = {type(op) for spec in SPECS.values() for op in lower(spec, precision=Precision(compute="bfloat16")).ops}
    assert set(OPS) - used == {ops.AttentionMap, ops.AttentionMapRelative, ops.QuantizeFixed, ops.QuantizeFp8, ops.QuantizeRows}


@given(specs())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_spec_lowers_and_cuts(spec):
    program = lower(spec)
    check(program)
    assert program.text()
    for label in [layer.label for layer in program.layers[:-1]]:
        for part in program.cut(label):
            check(part)


def test_context_given_wins_over_the_specs_own():
    long = LongRope(short_factor=(1.0, 1.0), long_factor=(2.0, 4.0), original_context=16, attention_factor=1.5)
    spec = spec_of(block(attention(position=Rotary(base=100.0, dims=4, scaling=long))))
    short, longer = lower(spec), lower(spec, context=17)
    assert (short.context, longer.context) == (16, 17)
    rotations = [next(op for op in p.ops if isinstance(op, ops.Rotate)) for p in (short, longer)]
    assert rotations[0].frequencies == (1.0, pytest.approx(0.1))
    assert rotations[1].frequencies == (0.5, pytest.approx(0.025))
    assert {rotation.magnitude for rotation in rotations} == {1.5}


# --- text


@EVERY
def test_text_mentions_everything(name):
    program = lower(SPECS[name])
    text = program.text()
    lines = text.splitlines()
    assert text.endswith("\n")
    assert len([line for line in lines if line.startswith("  ")]) == len(program.ops)
    for op, line in zip(program.ops, [line for line in lines if line.startswith("  ")]):
        assert type(op).__name__ in line
        assert all(f"{made}: {program.values[made]}" in line.split(" = ")[0] for made in op.outputs), line
        assert all(read in line for read in (*op.inputs, *op.params)), line
        assert all(f"@{ref.group}[{ref.slot}]" in line for ref in op.state_refs), line
    for layer in program.layers:
        assert f"{layer.label}:" in lines
    for group in program.states:
        assert any(line.startswith(f"state {group.name}: ") and group.rollback in line and group.reuse in line for line in lines)
    assert lines[-1] == f"return {', '.join(program.outputs)}"


def test_text_shows_formats_and_never_one_for_the_other():
    weight = "blocks.0.feed_forward.up.weight"

    def line(formats):
        text = lower(spec_of(), formats=formats).text()
        return next(line for line in text.splitlines() if weight in line)

    assert "format" not in line(None)
    only_weights, only_activations = line(LinearFormats({weight: "int4"})), line(LinearFormats({}, {weight: "int8"}))
    assert "weight_format=int4" in only_weights
    assert ".int8" not in only_weights
    assert "blocks.0.feed_forward_norm.int8, blocks.0.feed_forward_norm.scale" in only_activations
    assert "weight_format" not in only_activations


def test_formats_reach_every_kind_of_product():
    spec = spec_of(block("latent", "moe"))
    plain = lower(spec)
    weights = {op.weight for op in plain.ops if hasattr(op, "weight_format")}
    named = lower(spec, formats=LinearFormats(dict.fromkeys(weights, "int4")))
    for op in named.ops:
        if hasattr(op, "weight_format"):
            assert op.weight_format == "int4", op
    assert {type(op) for op in named.ops if hasattr(op, "weight_format")} == {ops.Linear, ops.HeadLinear, ops.ExpertLinear}


# --- taps


@EVERY
def test_dead_ops_weights_and_states_are_dropped(name):
    program = lower(SPECS[name])
    assert program.with_outputs(program.outputs) == dataclasses.replace(program)
    tapped = program.with_outputs(["embedding"])
    assert [type(op) for op in tapped.ops] == [ops.Embed]
    assert (tuple(tapped.params), tapped.states, [layer.label for layer in tapped.layers]) == (("embedding.weight",), (), ["embedding"])


def test_tapping_a_hidden_state_drops_the_head_and_later_blocks_but_writes_state_so_far():
    program = lower(spec_of(block(), block("mamba"), block("window")))
    tapped = program.with_outputs(["blocks.1.mixer.conv"])
    assert [layer.label for layer in tapped.layers] == ["embedding", "blocks.0", "blocks.1"]
    assert not any(name.startswith(("head", "norm", "blocks.2")) for name in tapped.params)
    assert [type(op).__name__ for op in tapped.ops if "writes" in op.contract.state] == ["AppendKv", "CausalConv"]
    # the first block's keys are written even where only something before them is asked for later on
    only_ff = program.with_outputs(["blocks.0.feed_forward.up"])
    assert any(isinstance(op, ops.AppendKv) for op in only_ff.ops)


def test_taps_keep_their_order_and_come_once():
    program = lower(spec_of())
    names = ["blocks.1.out", "embedding", "blocks.1.out", "logits"]
    assert program.with_outputs(names).outputs == ("blocks.1.out", "embedding", "logits")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.1.mixer.queries", "blocks.1.mixer.q"),
        ("blocks.0.mixer.feed_forward.up.weight", "embedding"),
        ("nonsense", "embedding"),
        ("blocks.0.feed_forward.map", "blocks.0.feed_forward.up"),
        ("blocks.9.mixer.map", "embedding"),
        ("head.weight", "embedding"),
    ],
)
def test_an_unknown_tap_is_refused_with_near_ones(name, near):
    with pytest.raises(UnsupportedError) as caught:
        lower(spec_of()).with_outputs([name])
    message = str(caught.value)
    assert name in message
    assert near in message
    assert "\n" not in message


# --- cuts


def placeless(op):
    return op.with_state(lambda _: StateRef("", 0))


@EVERY
@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_cut_hold_the_whole(name, tied):
    spec = SPECS[name]
    program = lower(msgspec.structs.replace(spec, head=msgspec.structs.replace(spec.head, tied=tied)))
    for layer in program.layers[:-1]:
        if not program.can_cut(layer.label):
            with pytest.raises(UnsupportedError, match="reads state that what is before writes"):
                program.cut(layer.label)
            continue
        first, second = program.cut(layer.label)
        check(first)
        check(second)
        assert [*map(placeless, first.ops), *map(placeless, second.ops)] == [*map(placeless, program.ops)]
        assert first.layers[-1].label == layer.label
        tied_later = any("embedding.weight" in op.params for op in second.ops)
        assert set(first.params) & set(second.params) == ({"embedding.weight"} if tied_later else set())
        assert set(first.params) | set(second.params) == set(program.params)
        for part in (first, second):  # each part holds its own state: slots counted from 0, bytes for its own layers only
            used = {ref for op in part.ops for ref in op.state_refs}
            assert used == {StateRef(group.name, slot) for group in part.states for slot in range(group.layers)}
        for measure in ("bytes_per_token", "bytes_per_sequence"):
            total = sum(getattr(group, measure)() for group in program.states)
            assert total == sum(getattr(group, measure)() for part in (first, second) for group in part.states)
        assert set(first.outputs) >= set(second.inputs)
        assert set(first.outputs) - set(second.inputs) | set(second.outputs) == set(program.outputs)


def test_a_cut_between_layers_that_share_keys_and_values_is_refused():
    program = lower(SPECS["cross-layer"])
    assert [program.can_cut(layer.label) for layer in program.layers[:-1]] == [True, False, False, False, True]
    assert [(group.layers, group.visible) for group in program.states] == [(1, Causal()), (1, SlidingWindow(size=3))]


def test_a_tap_that_crosses_a_cut_comes_out_of_the_first_part_once():
    program = lower(spec_of()).with_outputs(["blocks.0.out", "logits"])
    first, second = program.cut("blocks.0")
    assert first.outputs == second.inputs == ("blocks.0.out",)
    assert second.outputs == ("logits",)


@pytest.mark.parametrize("label", ["head", "blocks.7", "", "logits"])
def test_a_cut_elsewhere_is_refused(label):
    with pytest.raises(UnsupportedError, match=r"cut after .*embedding, blocks\.0, blocks\.1$"):
        lower(spec_of()).cut(label)


def test_an_unknown_state_group_is_refused():
    with pytest.raises(ConfigError, match="kv0"):
        lower(spec_of()).state("kv7")


# --- exits, rows, dtypes


def test_exits_become_outputs_of_their_own():
    program = lower(SPECS["exits"])
    assert set(program.outputs) == {"logits", "exits.0.logits", "exits.1.logits"}
    assert [layer.label for layer in program.layers] == [
        "embedding", "blocks.0", "exits.0", "blocks.1", "exits.1", "blocks.2", "head"
    ]  # fmt: skip
    early = program.with_outputs(["exits.0.logits"])
    assert [layer.label for layer in early.layers] == ["embedding", "blocks.0", "exits.0"]
    assert set(early.params) >= {"embedding.weight", "exits.0.norm.weight"}
    assert "exits.0.head.weight" not in program.params  # tied
    assert program.params["exits.1.head.weight"] == (11, 8)


@EVERY
def test_narrow_compute_has_explicit_casts_and_a_wide_residual(name):
    program = lower(SPECS[name], precision=Precision(compute="bfloat16"))
    check(program)
    values = program.values
    for value in values:
        if value in {"embedding", "embedding.positions", "embedding.sum", "embedding.norm"} or value.endswith((".out", ".mixer_out")):
            assert values[value].dtype == "float32", value
        if value.endswith("logits"):
            assert values[value].dtype == "float32", value
    for op in program.ops:
        inputs, outputs = ({values[n].dtype for n in names} for names in (op.inputs, op.outputs))
        match op:
            case ops.Linear() | ops.HeadLinear() | ops.ExpertLinear():
                assert inputs - {"int32"} == {"bfloat16"}, op
                assert outputs == {op.dtype}, op
            case ops.AppendKv() | ops.Attend() | ops.CausalConv():
                assert (inputs | outputs) - {"int32"} == {"bfloat16"}, op
            case ops.Cast():
                assert inputs != outputs, op
                assert outputs == {op.dtype}
            case ops.RmsNorm() | ops.LayerNorm() | ops.Embed() | ops.EmbedPositions():
                assert outputs == {op.dtype}
            case ops.Add():
                assert values[op.y].dtype == values[op.a].dtype
            case ops.Route() | ops.Combine():
                assert values[op.weights].dtype == "float32"
            case _:
                assert len(inputs | outputs) == 1, f"{op} changes a dtype without saying so"


def test_wide_programs_have_no_casts_and_no_cast_is_made_twice():
    assert not any(isinstance(op, ops.Cast) for op in lower(spec_of()).ops)
    casts = [op for op in lower(SPECS["wiring-post"], precision=Precision(compute="bfloat16")).ops if isinstance(op, ops.Cast)]
    assert len({(op.x, op.dtype) for op in casts}) == len(casts)


def test_the_spec_may_ask_for_another_residual():
    program = lower(spec_of(residual="bfloat16"))
    assert program.values["blocks.0.out"].dtype == "bfloat16"
    assert program.values["logits"].dtype == "float32"


# --- state groups


def test_bytes_by_hand():
    # 3 layers of 2 key/value heads of 4 + 4 features, 4 bytes each: 3 · 2 · 8 · 4 = 192 bytes a token
    (group,) = lower(spec_of(block(), block(), block())).states
    assert (group.name, group.layers, group.kv_heads, group.key_dim, group.value_dim) == ("kv0", 3, 2, 4, 4)
    assert (group.bytes_per_token(), group.bytes_per_sequence()) == (192, 0)
    # latent rows: 2 layers · (6 + 4) features · 4 bytes
    (latent,) = lower(SPECS["mixer-latent"]).states
    assert (latent.bytes_per_token(), latent.bytes_per_sequence(), latent.value_dim) == (80, 0, 6)
    # Mamba: 2 layers · (10 · 3 states + 3 · 10 taps) · 4 bytes, whatever the length
    groups = lower(SPECS["mixer-mamba"]).states
    assert {type(group) for group in groups} == {RecurrentGroup}
    assert (sum(g.bytes_per_sequence() for g in groups), sum(g.bytes_per_token() for g in groups)) == (480, 0)
    # the text says so too
    narrow = lower(spec_of(block(), block(), block()), cache="bfloat16")
    assert narrow.states[0].bytes_per_token() == 96
    assert "96 bytes a token (bfloat16)" in narrow.text()


def test_layers_share_a_group_only_where_geometry_and_visibility_agree():
    wide = attention(heads=4, kv_heads=4)
    program = lower(spec_of(block(), block("window"), block(), block(wide), block("window"), block(attention(value_dim=3))))
    assert [(g.name, g.layers, g.visible) for g in program.states] == [
        ("kv0", 2, Causal()), ("kv1", 2, SlidingWindow(size=3)), ("kv2", 1, Causal()), ("kv3", 1, Causal())
    ]  # fmt: skip
    refs = [ref for op in program.ops if isinstance(op, ops.AppendKv) for ref in op.state_refs]
    assert refs == [
        StateRef("kv0", 0), StateRef("kv1", 0), StateRef("kv0", 1), StateRef("kv2", 0), StateRef("kv1", 1), StateRef("kv3", 0)
    ]  # fmt: skip


def test_kinds_of_state_have_groups_of_their_own():
    kinds = {type(group) for group in lower(SPECS["mixed"]).states}
    assert kinds == {KvGroup, LatentGroup, RecurrentGroup}
    names = [group.name for group in lower(SPECS["mixed"]).states]
    assert len(set(names)) == len(names)


def test_every_slot_is_written_by_one_op():
    for spec in SPECS.values():
        program = lower(spec)
        for group in program.states:
            for slot in range(group.layers):
                touching = find_ops(program, StateRef(group.name, slot))
                assert sum("writes" in op.contract.state for op in touching) == 1


VISIBLE = st.one_of(
    st.just(Causal()),
    st.integers(1, 12).map(lambda n: SlidingWindow(size=n)),
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda pair: SegmentMemory(segment=pair[0], memory=pair[1])),
)


def seen_from(visible, query):
    """Every position that the Spec's words let a query see."""
    match visible:
        case Causal():
            return set(range(query + 1))
        case SlidingWindow(size=size):
            return set(range(query + 1)[-size:])
        case SegmentMemory(segment=segment, memory=memory):
            own = [p for p in range(query + 1) if p // segment == query // segment]
            return {*own, *range(max(0, own[0] - memory), own[0])}


@given(VISIBLE, st.integers(0, 60))
def test_oldest_visible_is_the_smallest_position_seen(visible, query):
    assert oldest_visible(visible, query) == min(seen_from(visible, query))
    # and pages freed by it are never wanted again
    assert oldest_visible(visible, query) <= oldest_visible(visible, query + 1)
    for group in (KvGroup("kv", 1, 1, 1, 1, visible), LatentGroup("latent", 1, 1, 1, visible)):
        assert group.oldest_visible(query) == oldest_visible(visible, query)


# --- rotary frequencies


def test_rotary_scalings_at_their_ends():
    plain, one = rotary_frequencies(ROPE, 8)
    assert (plain, one) == ((1.0, pytest.approx(0.01)), 1.0)
    halved, _ = rotary_frequencies(Rotary(base=10000.0, dims=4, scaling=LinearScaling(factor=2.0)), 8)
    assert halved == pytest.approx((0.5, 0.005))
    # over 1000 positions the fast pair turns 159 times (kept), the slow one 1.6 times (divided, or between)
    llama = Llama3Scaling(factor=8.0, low_frequency_factor=2.0, high_frequency_factor=4.0, original_context=1000)
    assert rotary_frequencies(Rotary(base=10000.0, dims=4, scaling=llama), 8)[0] == pytest.approx((1.0, 0.01 / 8))
    between = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_context=1000)
    keep = (1000 * 0.01 / (2 * math.pi) - 1) / 2
    assert rotary_frequencies(Rotary(base=10000.0, dims=4, scaling=between), 8)[0][1] == pytest.approx(0.01 * (keep + (1 - keep) / 8))
    yarn = Yarn(factor=4.0, original_context=1000, attention_factor=1.1)
    fast, slow = rotary_frequencies(Rotary(base=10000.0, dims=64, scaling=yarn), 8)[0][::31]
    assert (fast, slow) == (1.0, pytest.approx(10000 ** (-62 / 64) / 4))
    assert rotary_frequencies(Rotary(base=10000.0, dims=64, scaling=yarn), 8)[1] == 1.1


# --- batches


def test_batches_lay_sequences_end_to_end():
    batch = Batch.of([[4, 5, 6], [7], [8, 9]], [0, 12, 3], rows="last")
    arrays = Batch.of([np.array([4, 5, 6]), (7,), np.array([8, 9], np.int32)], [0, 12, 3], rows="last")
    for field in dataclasses.fields(Batch):
        found, other = getattr(batch, field.name), getattr(arrays, field.name)
        assert found.dtype == other.dtype == np.int32
        assert np.array_equal(found, other)
    assert batch.tokens.tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 12, 3, 4]
    assert batch.offsets.tolist() == [0, 3, 4, 6]
    assert batch.rows.tolist() == [2, 3, 5]
    assert {array.dtype for array in (batch.tokens, batch.positions, batch.offsets, batch.rows)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Batch.of([]), "at least one sequence"),
        (lambda: Batch.of([[1], []]), "at least one token"),
        (lambda: Batch.of([[1]], rows="first"), "rows='first'; accepted are all, last, none"),
        (lambda: Batch.of([[1, 2]], [0, 0]), "1 sequences need as many starts"),
        (lambda: Batch.of([[1, 2]], [-1]), "starts of 0 or more, not [-1]"),
        (lambda: Batch.of([[1.5]]), "whole numbers"),
        (lambda: Batch.of([[True]]), "whole numbers"),
        (lambda: Batch.of([[1], [True]]), "whole numbers"),
        (lambda: Batch.of([[1], [[2]]]), "whole numbers"),
        (lambda: Batch.of([[1], [1 << 31]]), "between 0 and the vocabulary size"),
        (lambda: Batch.of([[1], [-1]]), "between 0 and the vocabulary size"),
        (lambda: Batch.of([[1, 2]], [(1 << 31) - 2]), "starts of 0 or more"),
        (lambda: Batch.of([["a"]]), "whole numbers"),
        (lambda: Batch.of(["ab"]), "whole numbers"),
        (lambda: Batch.of([[[1], [2]]]), "flat"),
        (lambda: Batch.of([[[1], [2, 3]]]), "flat"),
        (lambda: Batch.of([[-1]]), "between 0"),
        (lambda: Batch.of([[1 << 31]]), "between 0"),
        (lambda: Batch.of([[1 << 80]]), "whole numbers"),
        (lambda: token_array([]), "non-empty"),
        (lambda: token_array(5), "flat"),
    ],
)
def test_a_batch_of_anything_else_is_refused(build, said):
    with pytest.raises(ConfigError) as caught:
        build()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
