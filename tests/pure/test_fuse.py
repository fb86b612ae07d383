"""Fusion as passes: what each joins, what it leaves, and that nothing is lost on the way. tests/ops plays fused Programs."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from hasten.program import LinearFormats, Precision, Products, RowChain, fuse, lower, ops, parts_of, unfuse
from hasten.program.fuse import ROW_WISE, join_products, join_row_chains
from tests.pure.specs import SPECS, block, spec_of, specs
from tests.pure.test_program import check

EVERY = pytest.mark.parametrize("name", SPECS)
ACTIVATIONS = ("none", "bf16", "int8")


def lowered(spec, activations="none", **settings):
    linear = [op.weight for op in lower(spec).ops if isinstance(op, ops.Linear | ops.ExpertLinear)]
    return lower(spec, formats=LinearFormats(activations=dict.fromkeys(linear, activations)), **settings)


def names(parts):
    return [type(part).__name__ for part in parts]


def shown(program):
    """One string per op: the kinds joined by +."""
    return ["+".join(names(parts_of(op))) for op in program.ops]


def whole(fused, program):
    """What holds for every fused Program: nothing is lost, hidden from a reader, or joined across kinds of rows."""
    check(fused)
    assert fused.outputs == program.outputs
    assert fused.params == program.params
    assert fused.states == program.states
    plain = unfuse(fused)
    check(plain)
    assert plain.values == program.values
    assert Counter(plain.ops) == Counter(program.ops)
    for op in fused.ops:
        if isinstance(op, RowChain):
            parts = op.parts
            assert len({plain.values[name].rows for part in parts for name in part.outputs}) <= 1
            made_by_parts = {name for part in parts for name in part.outputs}
            outside = {name for other in plain.ops if other not in parts for name in other.inputs} | set(program.outputs)
            assert not {name for name, _ in op.inner} & outside
            assert set(op.inputs).isdisjoint(made_by_parts)
            assert dict(op.inner) == {name: program.values[name] for name, _ in op.inner}
        if isinstance(op, Products):
            assert len({(part.x, part.scale) for part in op.parts}) == 1
            assert not op.inner


@EVERY
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_nothing_is_lost(name, activations):
    program = lowered(SPECS[name], activations)
    fused = fuse(program)
    whole(fused, program)
    assert len(fused.ops) < len(program.ops)
    whole(join_products(program), program)
    whole(join_row_chains(program), program)
    assert not {type(op) for op in unfuse(fused).ops} & {Products, RowChain}
    assert fuse(fused).ops == fused.ops  # nothing is left to join, and what is joined is left alone


@given(specs())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_nothing_of_any_spec_is_lost(spec):
    for precision in (Precision(), Precision(compute="bfloat16")):
        program = lower(spec, precision=precision)
        whole(fuse(program), program)


def test_what_is_joined_in_a_block_with_int8_activations():
    norms = block("norms", "gated")
    assert shown(fuse(lowered(spec_of(block("gqa"), norms), "int8"))) == [
        "Embed+RmsNorm+QuantizeRows",
        "Linear+Linear+Linear",
        "Rotate+Rotate+AppendKv",
        "Attend",
        "QuantizeRows",
        "Linear",
        "Add+RmsNorm+QuantizeRows",
        "Linear+Linear",
        "Gate+QuantizeRows",
        "Linear",
        "Add+RmsNorm+QuantizeRows",  # into the next block
        "Linear+Linear+Linear+Linear",  # the attention's own gate is brought forward
        "RmsNorm+RmsNorm+Rotate+Rotate+AppendKv",
        "Attend",
        "Gate+QuantizeRows",
        "Linear",
        "Add+RmsNorm+QuantizeRows",
        "Linear+Linear",
        "Gate+QuantizeRows",
        "Linear",
        "Add",
        "SelectRows+RmsNorm+QuantizeRows",  # the rows asked for are other rows
        "Linear",
    ]


def test_what_is_joined_with_bf16_activations_and_a_plain_feed_forward():
    assert shown(fuse(lowered(spec_of(block("gqa", "mlp")), "bf16"))) == [
        "Embed+RmsNorm+Cast",
        "Linear+Linear+Linear",
        "Rotate+Rotate+AppendKv",
        "Attend",
        "Cast",
        "Linear",
        "Add+RmsNorm+Cast",
        "Linear",
        "Activate+Cast",
        "Linear",
        "Add",
        "SelectRows+RmsNorm+Cast",
        "Linear",
    ]


@pytest.mark.parametrize("wiring", ["pre", "parallel"])
def test_products_are_joined_where_they_read_the_same_rows(wiring):
    program = lowered(spec_of(block("gqa", "gated", wiring), block("gqa", "moe-shared", wiring)), "int8")
    same = Counter((op.x, op.scale) for op in program.ops if isinstance(op, ops.Linear))
    joined = {(op.parts[0].x, op.parts[0].scale): len(op.parts) for op in join_products(program).ops if isinstance(op, Products)}
    assert joined == {key: count for key, count in same.items() if count > 1}
    assert len(joined) == 4 if wiring == "pre" else len(joined) >= 2


def test_ops_that_no_chain_plays_are_left_alone():
    program = lowered(spec_of(block("gqa", "gated")), "int8")
    fused = fuse(program, ())
    assert not any(isinstance(op, RowChain) for op in fused.ops)
    without = fuse(program, [kind for kind in ROW_WISE if kind is not ops.RmsNorm])
    assert "Add+RmsNorm+QuantizeRows" not in shown(without)
    assert "RmsNorm" in shown(without)
    assert "Rotate+Rotate+AppendKv" in shown(without)


def test_what_is_tapped_stays_an_output():
    program = lowered(spec_of(block("gqa", "gated")), "int8")
    tapped = ["blocks.0.mixer_norm", "blocks.0.mixer.k_rotated", "blocks.0.feed_forward.activated", "logits"]
    for name in tapped[:-1]:
        assert name not in fuse(program).values
    fused = fuse(program.with_outputs(tapped))
    whole(fused, program.with_outputs(tapped))
    assert fused.outputs == tuple(tapped)
    assert set(tapped) <= set(fused.values)
    assert shown(fused) == shown(fuse(program))
    everything = program.with_outputs(program.values)
    assert not any(op.inner for op in fuse(everything).ops if isinstance(op, RowChain))


def test_a_fused_program_prints_its_parts():
    program = lowered(spec_of(block("gqa", "gated")), "int8")
    fused = fuse(program)
    lines = fused.text().splitlines()
    heads = [line for line in lines if line.startswith("  ") and not line.startswith("    ")]
    parts = [line.strip() for line in lines if line.startswith("    ")]
    assert len(heads) == len(fused.ops)
    plain = {line.strip() for line in program.text().splitlines() if line.startswith("  ")}
    assert set(parts) <= plain
    assert len(parts) == sum(len(parts_of(op)) for op in fused.ops if isinstance(op, Products | RowChain))
    assert f"# {len(fused.ops)} ops" in lines[1]


def test_a_layer_without_an_op_left_is_dropped():
    program = lowered(spec_of()).with_outputs(["blocks.1.mixer_norm"])
    fused = fuse(program)
    whole(fused, program)
    assert [layer.label for layer in program.layers] == ["embedding", "blocks.0", "blocks.1"]
    assert [layer.label for layer in fused.layers] == ["embedding", "blocks.0"]


@EVERY
def test_fused_programs_are_trimmed_and_cut_like_others(name):
    program = lowered(SPECS[name])
    fused = fuse(program)
    for value in fused.values:
        check(fused.with_outputs([value]))
    for layer in filter(lambda layer: fused.can_cut(layer.label), fused.layers[:-1]):
        for part in fused.cut(layer.label):
            check(part)


def test_fused_ops_are_renamed_and_moved_part_by_part():
    fused = fuse(lowered(spec_of(block("gqa", "gated")), "int8"))
    chain = next(op for op in fused.ops if isinstance(op, RowChain) and op.state_refs)
    renamed = chain.renamed(lambda name: f"a.{name}")
    assert renamed.inputs == tuple(f"a.{name}" for name in chain.inputs)
    assert renamed.outputs == tuple(f"a.{name}" for name in chain.outputs)
    assert [name for name, _ in renamed.inner] == [f"a.{name}" for name, _ in chain.inner]
    assert renamed.renamed(lambda name: name.removeprefix("a.")) == chain
    assert chain.contract.state == "writes"
    assert chain.contract.differentiable
    assert chain.contract.tolerance == tuple(2 * bound for bound in ops.Rotate.contract.tolerance)
    assert not next(op for op in fused.ops if any(isinstance(part, ops.QuantizeRows) for part in parts_of(op))).contract.differentiable
    moved = chain.with_state(lambda ref: type(ref)(ref.group, ref.slot + 7))
    assert [ref.slot for ref in moved.state_refs] == [ref.slot + 7 for ref in chain.state_refs]
