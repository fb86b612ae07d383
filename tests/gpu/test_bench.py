"""`hasten bench roofline|ops --backend cuda`: what is counted, and what is said where there is no device. Times are made up."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from hasten.backends.cuda import backend as module
from hasten.backends.cuda import limits as limits_module
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.limits import graph_seconds, measure_roofline
from hasten.backends.cuda.op_times import _filled, _told_apart, op_names, op_times
from hasten.base.errors import ConfigError
from hasten.checkpoint import SHAPES, load, random_model
from hasten.families import all_families
from hasten.measure import device_kernels as measured
from hasten.program import Formats, ops
from tests.cli import assert_refused, main
from tests.families.oracles import make_checkpoint


def model_of(directory, name="llama"):
    (config,) = (family.examples[0] for family in all_families() if family.name == name)
    make_checkpoint(config, directory)
    return load(directory), config


@pytest.fixture
def backend():
    return CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)


def counting_clock(device, work):
    """Plays the work once; 1 ms, whatever it was."""
    work()
    return 1e-3


def timed(backend, model, rows, contexts, formats=None):
    session = backend.session(model, 64, formats)
    return session, list(op_times(session, rows, contexts, lambda cost: True, counting_clock))


def test_every_unit_is_timed_with_all_of_its_layers(tmp_path, backend):
    model, config = model_of(tmp_path)
    session, found = timed(backend, model, (1, 5), (20,))
    names = {each.cost.op for each in found}
    assert names == set(op_names(session.program))
    assert {"linear", "attend", "rotate+append_kv", "rms_norm", "embed"} <= names
    layers = config["num_hidden_layers"]
    for each in found:
        assert each.seconds == pytest.approx(1e-3 / each.copies)
        assert each.copies in {1, layers, 2 * layers - 1, 2 * layers}
        assert (each.cost.context == 20) == (each.cost.op == "attend")
    assert len({each.cost for each in found}) == len(found)
    assert {each.cost.rows for each in found} == {1, 5}
    assert layers > 1


def test_what_a_product_reads_and_computes_is_counted_by_hand(tmp_path, backend):
    model, config = model_of(tmp_path)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    _, found = timed(backend, model, (5,), (20,), Formats("bf16"))
    by_shape = {each.cost.shape: each.cost for each in found if each.cost.op == "linear"}
    up = by_shape[f"{2 * inner}x{width}"]
    assert (up.format, up.arithmetic) == ("bf16 × bf16", "bf16")
    assert up.operations == 2 * 5 * 2 * inner * width
    assert up.bytes >= 2 * (2 * inner * width + 5 * width + 5 * 2 * inner)
    assert up.bytes <= 2 * (2 * inner * 128 * math.ceil(width / 128) + 5 * width + 5 * 2 * inner)
    assert by_shape[f"{vocab}x{width}"].operations == 2 * vocab * width  # logits of one row
    _, found = timed(backend, model, (5,), (20,), Formats("int8"))
    fed = {each.cost.format for each in found if each.cost.op == "linear" and f"{width}" in each.cost.shape}
    assert "int8 × int8" in fed
    _, found = timed(backend, model, (5,), (20,), Formats("fp8", "fp8"))
    (up,) = (each.cost for each in found if each.cost.shape == f"{2 * inner}x{width}")
    assert (up.format, up.arithmetic) == ("fp8 × fp8", "fp8")
    assert 2 * inner * width + 5 * width <= up.bytes <= 2 * inner * (128 * math.ceil(width / 128) + 4) + 5 * (width + 4) + 5 * 2 * inner * 2
    assert "rms_norm+quantize_fp8" in {each.cost.op for each in found} | {each.cost.op.removeprefix("add+") for each in found}


def test_what_attention_reads_and_computes_is_counted_by_hand(tmp_path, backend):
    model, config = model_of(tmp_path)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    _, found = timed(backend, model, (3,), (20,))
    one, three = sorted((each.cost for each in found if each.cost.op == "attend"), key=lambda cost: cost.rows)
    assert (one.rows, three.rows, one.context, three.format) == (1, 3, 20, "bf16 cache")
    assert one.bytes == 20 * kv * 2 * dim * 2 + 2 * heads * dim * 2
    assert one.operations == 2 * 2 * heads * dim * 20
    assert three.operations == 2 * 2 * heads * dim * (18 + 19 + 20)


def test_a_window_reads_no_more_than_its_tokens(tmp_path, backend):
    model, config = model_of(tmp_path, "mistral")
    assert (window := config["sliding_window"]) < 40
    _, found = timed(backend, model, (1,), (40,))
    (cost,) = (each.cost for each in found if each.cost.op == "attend")
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    assert cost.operations == 2 * 2 * heads * dim * window
    assert cost.shape.endswith(f"window {window}")
    assert cost.bytes == window * config["num_key_value_heads"] * 2 * dim * 2 + 2 * heads * dim * 2


EXPERTS = [("mixtral", None), ("deepseek_v3", Formats("int8")), ("gpt_oss", Formats("int4-g32"))]


@pytest.mark.parametrize(("name", "formats"), EXPERTS)
def test_experts_read_and_compute_what_is_counted_by_hand(name, formats, tmp_path, backend):
    """As many of their weights as rows can choose, one after the other, and each row as often as it chooses."""
    model, _ = model_of(tmp_path, name)
    session = backend.session(model, 64, formats)
    found, program = list(op_times(session, (9,), (), lambda cost: True, lambda device, work: 1e-3)), session.program
    assert {"route", "expert_linear", "combine", "tell_apart"} < {each.cost.op for each in found} == set(op_names(program)) - {"attend"}
    products = [op for op in program.ops if isinstance(op, ops.ExpertLinear)]
    chosen = {f"{program.params[op.weight][0]} top {program.values[op.experts].features[-1]}" for op in products}
    assert {each.cost.shape for each in found if each.cost.op in {"route", "tell_apart"}} == chosen
    costs = {each.cost.shape: each for each in found if each.cost.op == "expert_linear"}
    assert sum(each.copies for each in costs.values()) == len(products)
    for op in products:
        (count, out, size), top = program.params[op.weight], program.values[op.experts].features[-1]
        kind = program.values[op.x].dtype
        weight = session.weights.linear((op.weight,), op.weight_format, {"int8": torch.int8, "bfloat16": torch.bfloat16}[kind])
        cost = costs[f"{count}x{out}x{size} top {top}"].cost
        assert cost.operations == 2 * 9 * top * out * size
        assert cost.arithmetic == {"int8": "int8", "bfloat16": "bf16"}[kind]
        assert cost.format == (f"{op.weight_format} × " if formats else "bf16 × ") + cost.arithmetic
        values = 9 * (math.prod(program.values[op.x].features) * (1 if kind == "int8" else 2) + top * out * 2 + 4 * top)
        scales = 0 if op.scale is None else 4 * 9 * math.prod(program.values[op.scale].features)
        assert cost.bytes == min(count, 9 * top) * weight.nbytes // count + values + scales


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_rows_choose_experts_evenly(rows, tmp_path, backend):
    """And rows of nobody none; that is what their products are of."""
    model, config = model_of(tmp_path, "mixtral")
    session = backend.session(model, 64)
    tape, top = _filled(session, rows, rows), config["num_experts_per_tok"]
    costs = [cost for cost, _ in _told_apart(session, tape, rows)]
    assert len(costs) == config["num_hidden_layers"]
    for (each,) in tape.blocks.values():
        counts = each.counts.tolist()
        assert sum(counts) == rows * top
        assert max(counts) - min(counts) <= 1
        assert sorted(x for x in each.places.tolist()[: each.block * int((each.experts >= 0).sum())] if x >= 0) == [*range(rows * top)]
    assert {cost.shape for cost in costs} == {f"{len(counts)} top {top}"}
    linear = [launch for unit, launch in tape.units if isinstance(unit.parts[0], ops.ExpertLinear)]
    read = {id(launch.args[3]) for launch in linear}
    assert read == {id(each) for its in tape.blocks.values() for each in its}
    x, weight, y, *_ = linear[0].args
    with torch.inference_mode():
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(rows)))
        y.fill_(float("nan"))
        linear[0]()
    chosen = torch.arange(rows * top, device=x.device).view(rows, top) % len(counts)
    expected = torch.einsum("taoi,ti->tao", weight.codes[chosen, :, : weight.size].float(), x[:rows].float())
    assert torch.allclose(y[:rows].float(), expected, rtol=1e-2, atol=1e-2)


def test_the_launches_are_those_of_a_step(tmp_path, backend):
    """Of every unit one, each of which was launched among all of the tape's."""
    model, _ = model_of(tmp_path)
    session = backend.session(model, 64)
    player = next(iter(session._tapes.values()))
    launched = [id(launch) for launch in player.tape.launches]
    own = [id(launch) for _, launch in player.tape.units]
    assert [each for each in launched if each in set(own)] == own
    assert len(set(own)) == len(own) < len(launched)


def test_more_rows_than_a_step_has_and_contexts_beyond_the_sessions(tmp_path, backend):
    model, _ = model_of(tmp_path)
    session = backend.session(model, 64)
    with pytest.raises(ConfigError, match="at most 2048"):
        next(op_times(session, (4096,), (), lambda cost: True, counting_clock))
    with pytest.raises(ConfigError, match="opened for 64"):
        next(op_times(session, (65,), (), lambda cost: True, counting_clock))


# --- limits


def test_a_devices_roofline(monkeypatch):
    """Twice the bytes copied and a product's operations over made times."""
    device, asked = torch.device("cpu"), []
    monkeypatch.setattr(limits_module, "seconds", lambda device, work, repeats: asked.append(repeats) or work() is None or 0.5)
    found = measure_roofline(device, "made", (9, 0), 100 << 20, 3)
    assert asked == [3] * 5
    assert found.isa == "sm_90"
    assert found.copied_bytes == 100 << 20
    assert found.copy_gb_per_s == pytest.approx(2 * (100 << 20) / 0.5 / 1e9)
    assert {found.bf16_tflops, found.int8_tops, found.fp8_tflops, found.f32_tflops} == {2 * 256**3 / 0.5 / 1e12}
    older = measure_roofline(device, "made", (8, 6), 100 << 20, 3)
    assert (older.isa, older.fp8_tflops, older.bf16_tflops) == ("sm_86", None, found.bf16_tflops)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a device")
def test_a_graph_is_timed():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    assert 1e-6 < graph_seconds(x.device, lambda: torch.mm(x, x, out=y)) < 0.1


# --- the command


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    monkeypatch.setattr(module, "graph_seconds", counting_clock)


def test_roofline(interpreted, monkeypatch, capsys):
    ran = main(monkeypatch, capsys, "bench", "roofline", "--backend", "cuda", "--bytes", 64 << 20, "--repeats", 1, "--json")
    facts = json.loads(ran.out)
    assert (facts["device"], facts["isa"], facts["copied_bytes"]) == ("interpreter", "sm_90", 64 << 20)
    assert min(facts["copy_gb_per_s"], facts["bf16_tflops"], facts["int8_tops"], facts["fp8_tflops"], facts["f32_tflops"]) > 0
    told = main(monkeypatch, capsys, "bench", "roofline", "--backend", "cuda", "--bytes", 1, "--repeats", 1).out
    assert told.startswith("device    interpreter, sm_90\n")
    assert "64 MiB read and written" in told
    assert "\nfp8       " in told
    monkeypatch.setattr(module, "find_device", lambda: dataclasses.replace(INTERPRETED, capability=(8, 6)))
    assert "\nfp8       none\n" in main(monkeypatch, capsys, "bench", "roofline", "--backend", "cuda", "--bytes", 1, "--repeats", 1).out


def test_ops(interpreted, monkeypatch, capsys, tmp_path):
    """Of a small shape: each of the formats, what is no product once, and shares of the limits of the same moment."""
    config = next(family.examples[0] for family in all_families() if family.name == "llama")
    monkeypatch.setitem(SHAPES, "small", config)
    monkeypatch.setattr("hasten.backends.cuda.session.limits", lambda *_: (100.0, 1.0))
    ran = main(monkeypatch, capsys, "bench", "ops", "--backend", "cuda", "--shape", "small", "--rows", "2", "--context", "20", "--json")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert {row["format"] for row in rows if row["op"] == "linear"} >= {f"{weights} × {fed}" for weights, fed in measured.FORMATS}
    keys = [(row["op"], row["format"], row["shape"], row["rows"], row["context"]) for row in rows]
    assert [key for key, count in Counter(keys).items() if count > 1] == []
    assert {row["op"] for row in rows} >= {"attend", "embed", "rms_norm+quantize_rows"}
    for row in rows:
        assert (row["isa"], row["threads"]) == ("sm_90", None)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["of_limit"] == pytest.approx(max(row["bytes"] / 1e5, row["operations"] / 1e6) / row["us"])
        assert row["bound"] == ("read" if row["bytes"] / 1e5 >= row["operations"] / 1e6 else "peak")
    ran = main(monkeypatch, capsys, "bench", "ops", "--backend", "cuda", "--shape", "small", "--rows", "1", "--only", "embed")
    lines = ran.out.splitlines()
    assert lines[0] == "sm_90"
    assert len(lines) == 3
    assert lines[2].startswith("embed")
    refused = main(monkeypatch, capsys, "bench", "ops", "--backend", "cuda", "--shape", "small", "--only", "fly")
    assert_refused(refused, "only is 'fly'", "linear", "attend")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("command", ["roofline", "ops"])
def test_without_a_device(command, monkeypatch, capsys):
    assert_refused(main(monkeypatch, capsys, "bench", command, "--backend", "cuda"), "needs an NVIDIA GPU", "--backend cpu")
    assert_refused(main(monkeypatch, capsys, "bench", command, "--backend", "reference"), "backend is 'reference'", "cpu, cuda")
    assert_refused(main(monkeypatch, capsys, "bench", command, "--backend", "cuda", "--threads", 1), "--threads", "leave them out")


def test_no_kernel_of_a_large_model_is_nameless():
    names = op_names(CudaBackend(INTERPRETED).program(random_model("llama-3.1-8b"), formats=Formats("int8")))
    assert "rotate+append_kv" in names
    assert all(name.replace("_", "").replace("+", "").islower() for name in names)
    assert np.all([len(name) > 2 for name in names])
