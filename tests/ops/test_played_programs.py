"""Programs played by the reference backend: values are what the Program says they are, whatever is tapped, cut or asked for."""

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hasten.backends.reference import State, play
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.program import Batch, Precision, RecurrentGroup, lower, ops
from hasten.program.program import find_ops
from tests.pure.specs import SPECS, block, moe, spec_of, specs
from tests.pure.test_program import check

torch.set_num_threads(1)

BATCH = Batch.of([[1, 2, 3, 4, 5], [6, 7], [8]])
EVERY = pytest.mark.parametrize("name", SPECS)
SYMBOLS = {"T": 8, "S": 3, "R": 8}


def random_weights(program, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype) for name, shape in program.params.items()}


@EVERY
def test_values_have_the_shapes_and_dtypes_that_the_program_says(name):
    for precision in (Precision(), Precision(compute="bfloat16")):
        program = lower(SPECS[name], precision=precision)
        tapped = program.with_outputs(program.values)
        assert tapped.ops == program.ops
        outputs, _ = play(tapped, random_weights(program, dtype=getattr(torch, precision.compute)), BATCH)
        for value, tensor in outputs.items():
            said = program.values[value]
            assert tuple(tensor.shape) == (SYMBOLS[said.rows], *said.features), value
            assert str(tensor.dtype) == f"torch.{said.dtype}", value


@given(specs())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_spec_plays(spec):
    program = lower(spec)
    outputs, _ = play(program.with_outputs(program.values), random_weights(program), Batch.of([[0]], rows="last"))
    for value, tensor in outputs.items():
        said = program.values[value]
        assert (tuple(tensor.shape), str(tensor.dtype)) == ((1, *said.features), f"torch.{said.dtype}"), value


@EVERY
def test_any_value_can_be_tapped_without_changing_it(name):
    program = lower(SPECS[name])
    weights = random_weights(program)
    whole, _ = play(program, weights, BATCH)
    for value in program.values:
        tapped = program.with_outputs([value])
        check(tapped)
        assert tapped.outputs == (value,)
        alone, _ = play(tapped, weights, BATCH)
        beside, _ = play(program.with_outputs([*program.outputs, value]), weights, BATCH)
        assert torch.equal(alone[value], beside[value])
        assert all(torch.equal(beside[output], whole[output]) for output in program.outputs)


@pytest.mark.parametrize("name", [n for n in SPECS if n.startswith("mixer-")])
def test_attention_maps_times_values_are_what_attend_gives(name):
    program = lower(SPECS[name], precision=Precision("float64", "float64", "float64"))
    attends = [op for op in program.ops if isinstance(op, ops.Attend | ops.AttendRelative)]
    if not attends:
        with pytest.raises(UnsupportedError):
            program.with_outputs(["blocks.0.mixer.map"])
        return
    attend = attends[1]
    append = next(op for op in find_ops(program, attend.state) if isinstance(op, ops.AppendKv))
    maps, values = "blocks.1.mixer.map", append.v or append.k
    tapped = program.with_outputs([maps, values, attend.y, "logits"])
    check(tapped)
    weights = random_weights(program, dtype=torch.float64)
    outputs, _ = play(tapped, weights, BATCH)
    plain, _ = play(program, weights, BATCH)
    assert torch.equal(outputs["logits"], plain["logits"])
    assert not any(isinstance(op, ops.AttentionMap | ops.AttentionMapRelative) for op in program.ops)

    probabilities, kv_heads = outputs[maps], getattr(attend, "kv_heads", attend.heads)
    assert probabilities.shape == (8, attend.heads, 5)
    assert (probabilities >= 0).all()
    sums = probabilities.sum(-1)
    if getattr(attend, "sinks", None) is None:
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
    else:
        assert (sums < 1).all()
    for begin, end in zip(BATCH.offsets, BATCH.offsets[1:]):
        length = int(end - begin)
        assert not probabilities[begin:end, :, length:].any()
        assert not probabilities[begin:end, :, :length].triu(1).permute(1, 0, 2).triu(1).any()
        seen = outputs[values][begin:end].unflatten(-1, (kv_heads, -1))[..., : getattr(attend, "value_dim", attend.head_dim)]
        seen = seen.repeat_interleave(attend.heads // kv_heads, dim=1)
        mixed = torch.einsum("qhc,chd->qhd", probabilities[begin:end, :, :length], seen).flatten(-2)
        torch.testing.assert_close(mixed, outputs[attend.y][begin:end], rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_cut_make_the_whole(name, tied):
    spec = SPECS[name]
    program = lower(msgspec.structs.replace(spec, head=msgspec.structs.replace(spec.head, tied=tied)))
    weights = random_weights(program)
    whole, _ = play(program, weights, BATCH)
    for layer in program.layers[:-1]:
        if not program.can_cut(layer.label):
            continue
        first, second = program.cut(layer.label)
        middle, _ = play(first, weights, BATCH)
        end, _ = play(second, weights, BATCH, given={n: middle[n] for n in second.inputs})
        for output, tensor in whole.items():
            assert torch.equal((end if output in end else middle)[output], tensor), (layer.label, output)


def test_parts_can_be_cut_again():
    program = lower(spec_of(block(), block("mamba"), block("delta")))
    weights = random_weights(program)
    whole, _ = play(program, weights, BATCH)
    rest, values = program, {}
    for label in [layer.label for layer in program.layers[:-1]]:
        part, rest = rest.cut(label)
        values, _ = play(part, weights, BATCH, given={n: values[n] for n in part.inputs})
    values, _ = play(rest, weights, BATCH, given=values)
    assert torch.equal(values["logits"], whole["logits"])


def test_an_exit_alone_is_the_exit_of_the_whole():
    program = lower(SPECS["exits"])
    weights = random_weights(program)
    whole, _ = play(program, weights, BATCH)
    alone, _ = play(program.with_outputs(["exits.0.logits"]), weights, BATCH)
    assert torch.equal(alone["exits.0.logits"], whole["exits.0.logits"])
    assert whole["exits.0.logits"].abs().max() <= 2.0  # its own softcap


@pytest.mark.parametrize(("rows", "wanted"), [("all", range(8)), ("last", (4, 6, 7)), ("none", ())])
def test_logits_are_of_the_rows_asked_for(rows, wanted):
    program = lower(spec_of())
    weights = random_weights(program)
    whole, _ = play(program, weights, BATCH)
    some, _ = play(program, weights, Batch.of([[1, 2, 3, 4, 5], [6, 7], [8]], rows=rows))
    assert some["logits"].shape == (len(wanted), 11)
    torch.testing.assert_close(some["logits"], whole["logits"][list(wanted)], rtol=1e-5, atol=1e-6)


def test_what_stays_in_state_is_what_its_group_says():
    program = lower(SPECS["mixed"])
    weights = random_weights(program)
    _, state = play(program, weights, BATCH, State(3))
    assert set(state.entries) == {ref for op in program.ops for ref in op.state_refs}
    for ref, entries in state.entries.items():
        group = program.state(ref.group)
        for length, entry in zip((5, 2, 1), entries):
            if isinstance(group, RecurrentGroup):
                assert [tuple(t.shape) for t in entry] == [group.shape]
            else:
                assert {t.shape[0] for t in entry} == {length - group.oldest_visible(length)}
                assert sum(t[0].nbytes for t in entry) * group.layers == group.bytes_per_token()


@pytest.mark.parametrize(
    ("name", "batch", "said"),
    [
        ("mixer-gqa", Batch.of([[11]]), "token id 11 is outside the vocabulary; accepted are 0 to 10"),
        ("mixer-gqa", Batch.of([[1]], [16]), "position 16 is beyond the context of 16"),
        ("mixer-gqa", Batch.of([list(range(10)) * 2]), "position 19 is beyond the context of 16"),
    ],
)
def test_ids_outside_the_tables_are_refused(name, batch, said):
    program = lower(SPECS[name])
    with pytest.raises(ConfigError, match=said):
        play(program, random_weights(program), batch)


def test_positions_beyond_a_learned_table_are_refused():
    program = lower(SPECS["ends"], context=64)  # the table has 20 rows, of which the first two serve no position
    weights = random_weights(program)
    play(program, weights, Batch.of([[1]], [17]))
    with pytest.raises(ConfigError, match="position 18 has no learned vector; accepted are 0 to 17"):
        play(program, weights, Batch.of([[1]], [18]))


def test_router_weights_of_a_mixture_are_all_used():
    program = lower(spec_of(block(feed_forward=moe(experts=3, top_k=3))))
    chosen, _ = play(program.with_outputs(["blocks.0.feed_forward.chosen"]), random_weights(program), BATCH)
    assert chosen["blocks.0.feed_forward.chosen"].sort(-1).values.tolist() == [[0, 1, 2]] * 8
