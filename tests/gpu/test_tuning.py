"""Which block sizes are kept of what was timed; times are made up here, for the interpreter has none that mean anything."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from hasten.backends.cuda import backend as module
from hasten.backends.cuda import tape, tuning
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.candidates import LINEAR, cublas, scaled_mm
from hasten.backends.cuda.kernels.linear import Order, Tiles, default_order, default_tiles, linear
from hasten.backends.cuda.kernels.pack import is_two_of_four, unpack
from hasten.backends.cuda.products import Product, products_of
from hasten.backends.cuda.tuned import Tuned, TunedLinear, read
from hasten.backends.cuda.tuning import Timing, chosen, orders, promising, tiles_for, tune
from hasten.backends.cuda.units import units_of
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load, random_model
from hasten.families import all_families
from hasten.formats.linear import LinearFormat
from hasten.formats.weights import Weight, Weights
from hasten.program import Batch, Formats, ops
from tests.cli import assert_refused, main
from tests.families.oracles import make_checkpoint

DEFAULT, OTHER, THIRD = Order(64, 2), Order(128, 1), Order(64, 4)
FEW, SPLIT, MANY = Tiles(), Tiles(split=True), Tiles(out=128, rows=128, warps=8, stages=3)


def timing(order, rows, tiles, us):
    return Timing(order, rows, tiles, None, us) if isinstance(us, str) else Timing(order, rows, tiles, us / 1e6)


# --- choosing


def test_tiles_are_the_fastest_of_each_number_of_rows():
    found = [timing(DEFAULT, 1, FEW, 9), timing(DEFAULT, 1, SPLIT, 5), timing(DEFAULT, 2048, FEW, 90), timing(DEFAULT, 2048, MANY, 30)]
    assert chosen(found, DEFAULT) == TunedLinear(DEFAULT, {1: SPLIT, 2048: MANY})


def test_one_order_for_all_rows_however_they_differ():
    """Each order wins for some rows; the better mean decides for all of them."""
    found = [
        timing(DEFAULT, 1, FEW, 10), timing(DEFAULT, 64, FEW, 10), timing(OTHER, 1, SPLIT, 4), timing(OTHER, 64, SPLIT, 20),
        timing(THIRD, 1, FEW, 12), timing(THIRD, 64, FEW, 9),
    ]  # fmt: skip
    assert chosen(found, DEFAULT) == TunedLinear(OTHER, {1: SPLIT, 64: SPLIT})


@pytest.mark.parametrize(("us", "order"), [(9.7, OTHER), (9.9, DEFAULT), (10.0, DEFAULT), (11.0, DEFAULT)])
def test_another_order_has_to_be_worth_other_bits(us, order):
    assert chosen([timing(DEFAULT, 1, FEW, 10), timing(OTHER, 1, FEW, us)], DEFAULT).order == order


def test_what_was_refused_is_not_taken_however_fast_the_rest_of_its_order_is():
    found = [timing(DEFAULT, 1, FEW, 10), timing(DEFAULT, 64, FEW, 10), timing(OTHER, 1, FEW, 1), timing(OTHER, 64, FEW, "other bits")]
    assert chosen(found, DEFAULT).order == DEFAULT
    assert promising(found, DEFAULT) == (DEFAULT,)
    without = [timing(DEFAULT, 1, FEW, "no room"), timing(OTHER, 1, FEW, 5)]
    assert chosen(without, DEFAULT).order == OTHER
    with pytest.raises(UnsupportedError, match="no room"):
        chosen(without[:1], DEFAULT)


@pytest.mark.parametrize(("us", "kernel"), [((5, 5), "cublas"), ((5.2, 5.2), "triton"), ((1, 40), "triton"), ((1, None), "triton")])
def test_a_library_has_to_be_worth_it_over_all_rows(us, kernel):
    found = [timing(DEFAULT, 1, FEW, 4), timing(DEFAULT, 64, FEW, 7)]
    found += [
        Timing(DEFAULT, rows, FEW, None if each is None else each / 1e6, "" if each else "cublas: other bits", "cublas")
        for rows, each in zip((1, 64), us)
    ]
    its = chosen(found, DEFAULT)
    assert (its.kernel, its.order, its.tiles) == (kernel, DEFAULT, {1: FEW, 64: FEW})  # Triton's for weights that the library refuses


def test_the_default_is_always_promising():
    found = [timing(Order(32, parts), 1, FEW, parts) for parts in (1, 2, 3, 4)] + [timing(DEFAULT, 1, FEW, 50)]
    assert promising(found, DEFAULT, 2) == (DEFAULT, Order(32, 1), Order(32, 2))


@pytest.mark.parametrize("name", ["bf16", "int8", "int8-g32", "int4", "int4-g64-zp"])
def test_what_is_tried_goes_with_the_weight(name):
    product = Product(LinearFormat.parse(name), "bf16", 256, 4096, torch.float32)
    weight = product.weight(torch.device("cpu"))
    tried = list(orders(weight))
    assert tried[0] == default_order(weight)
    assert len(tried) == len(set(tried)) >= 3
    for order in tried:
        assert order.step == weight.span if weight.span else weight.group % order.step == 0
        for rows in (1, 17, 64, 65, 2048):
            cuts = list(tiles_for(rows, order))
            assert len(cuts) == len(set(cuts)) >= 9
            assert default_tiles(rows, order) in cuts or rows <= 64
            assert any(cut.split for cut in cuts) == (order.parts > 1 and rows <= 64)


# --- shapes


@pytest.mark.parametrize(
    ("name", "fed"),
    [("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("int8", "int8"), ("int4-g64-zp", "int8"), ("lut4", "int8"), ("f16", "f32")],
)
def test_random_weights_are_like_those_of_a_model(name, fed, device):
    """Of its format, with sums about one in size, all finite."""
    form = LinearFormat.parse(name)
    for heads in (1, 3):
        product = Product(form, fed, 40, 200, torch.float32, heads)
        weight, (x, scale) = product.weight(device), product.rows(5, device)
        values = unpack(weight)
        assert values.isfinite().all()
        assert values.unique().numel() > 3
        assert (weight.out, weight.size) == (40, 200)
        y = torch.full((5, heads * 40), math.nan, device=device)
        order = Order(weight.span or 32)
        linear(x, weight, y, scale=scale, order=order, tiles=Tiles())
        assert 0.05 < y.std() < 5


def model_of(directory, name="llama"):
    (config,) = (family.examples[0] for family in all_families() if family.name == name)
    make_checkpoint(config, directory)
    return load(directory)


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("llama", Formats()), ("llama", Formats("int4-g32")), ("deepseek_v3", Formats("int8")), ("gpt2", Formats()),
        ("llama", Formats("fp8", "fp8")),
    ],
)  # fmt: skip
def test_every_product_that_a_tape_looks_up_is_named(name, formats, tmp_path, monkeypatch):
    """By the names it asks for while it is compiled, the counted experts aside."""
    model, on, asked = model_of(tmp_path, name), CudaBackend(INTERPRETED), set()
    monkeypatch.setattr(Tuned, "order", lambda self, shape, weight: asked.add(shape) or default_order(weight))
    on.session(model, 32, formats)
    assert asked == {product.name for product in on.products(model, [formats])}
    assert asked


def test_shapes_of_a_large_model():
    products = CudaBackend(INTERPRETED).products(random_model("llama-3.1-8b"), [Formats("int4"), Formats("bf16")])
    names = {product.name for product in products}
    assert {"int4 × int8 6144 × 4096", "int4 × int8 28672 × 4096", "int4 × int8 4096 × 14336", "bf16 × bf16 128256 × 4096"} <= names
    assert len(names) == len(products)


# --- timing


SMALL = Product(LinearFormat.parse("bf16"), "bf16", 70, 300, torch.float32)


def made_clock(seed=0):
    """Plays what is to be timed and makes up how long that took."""
    random = np.random.default_rng(seed)

    def clock(device, work):
        work()
        return float(random.uniform(1e-6, 1e-4))

    return clock


def test_the_fastest_of_all_trials_is_chosen():
    found = tune(SMALL, INTERPRETED, (1, 17), made_clock(), footprint=1)
    assert all(each.seconds is not None for each in found.timings)
    assert len({(each.order, each.rows, each.tiles) for each in found.timings}) == len(found.timings) > 40
    for rows, cut in found.chosen.tiles.items():
        its = {each.tiles: each.seconds for each in found.timings if (each.order, each.rows) == (found.chosen.order, rows)}
        assert its[cut] == min(its.values())
        usual = {each.tiles: each.seconds for each in found.timings if (each.order, each.rows) == (found.default, rows)}
        assert found.seconds(rows) == (usual[default_tiles(rows, found.default)], its[cut])
    assert list(found.chosen.tiles) == [1, 17]


def test_tiles_that_change_a_bit_are_refused(monkeypatch):
    """Planted: with four stages the last row of any batch but the largest is off by one bit; they would be the fastest by far."""
    last = [False]

    def planted(x, weight, y, *, order, tiles, **given):
        linear(x, weight, y, order=order, tiles=tiles, **given)
        last[0] = tiles.stages == 4
        if tiles.stages == 4 and len(y) < 20:
            y.view(torch.int32)[-1, -1] ^= 1

    def clock(device, work):
        work()
        return 1e-9 if last[0] else 1e-6

    monkeypatch.setattr(tuning, "linear", planted)
    found = tune(SMALL, INTERPRETED, (1, 20), clock, footprint=1)
    assert found.chosen.tiles[1].stages != 4
    assert found.chosen.tiles[20].stages == 4
    assert found.refused == ("a row has other bits than among other rows",)


def test_a_device_with_too_little_room(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def planted(x, weight, y, *, order, tiles, **given):
        if tiles.stages > 3:
            raise OutOfResources(300_000, 232_448, "shared memory")
        linear(x, weight, y, order=order, tiles=tiles, **given)

    monkeypatch.setattr(tuning, "linear", planted)
    found = tune(SMALL, INTERPRETED, (1,), made_clock(), footprint=1)
    assert found.chosen.tiles[1].stages == 3
    assert found.refused == ("the device has too little shared memory",)
    assert found.seconds(1)[0] is None


def test_copies_of_a_weight_are_read_in_turn(monkeypatch):
    read_from = set()

    def planted(x, weight, y, **given):
        read_from.add(weight.codes.data_ptr())
        linear(x, weight, y, **given)

    monkeypatch.setattr(tuning, "linear", planted)
    monkeypatch.setattr(tuning, "orders", lambda weight: [default_order(weight)])
    monkeypatch.setattr(tuning, "tiles_for", lambda rows, order: [])
    found = tune(SMALL, INTERPRETED, (1,), lambda device, work: work() or 3.0, footprint=5 * 70 * 300 * 2 - 1)
    assert len(read_from) == 5
    assert found.seconds(1) == (3.0 / 5, 3.0 / 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times are a device's")
def test_on_a_device():
    """Whatever is chosen is not slower than the default, within what two measurements of the same differ by."""
    product = Product(LinearFormat.parse("int4"), "bf16", 4096, 4096, torch.bfloat16)
    found = tune(product, CudaBackend().on, (1, 256))
    for rows in (1, 256):
        before, after = found.seconds(rows)
        assert before is None or after <= 1.05 * before
    assert not any("bits" in why for why in found.refused)


NARROW = Product(LinearFormat.parse("bf16"), "bf16", 20, 40, torch.bfloat16)


def default_alone(monkeypatch):
    """One order and few tiles of Triton's are measured."""
    monkeypatch.setattr(tuning, "orders", lambda weight: [default_order(weight)])
    monkeypatch.setattr(tuning, "tiles_for", lambda rows, order: [])
    monkeypatch.setattr(tuning, "STEP_TOKENS", 24)


def with_library(monkeypatch, launch):
    """One order and few tiles of Triton's, and ``launch`` for cuBLAS; times by how long each is said to take."""
    default_alone(monkeypatch)
    said = []

    def planted(x, weight, y, *, scale=None, bias=None):
        said.append(len(x))
        launch(x, weight, y)

    def clock(device, work):
        del said[:]
        work()
        return 1e-6 if said else 5e-6

    monkeypatch.setattr(tuning, "LINEAR", [dataclasses.replace(LINEAR[0], launch=planted), *LINEAR[1:]])
    return said, clock


def row_by_row(x, weight, y):
    for number in range(len(x)):
        y[number] = (x[number].float() * weight.codes.float()).sum(-1)


def test_a_library_that_is_faster_and_invariant(monkeypatch):
    lengths, clock = [], None
    said, clock = with_library(monkeypatch, lambda x, weight, y: lengths.append(len(x)) or row_by_row(x, weight, y))
    found = tune(NARROW, INTERPRETED, (1, 24), clock, footprint=1)
    assert found.chosen.kernel == "cublas"
    assert set(lengths) == {1, 2, 4, 8, 16, 24}  # every bucket there is up to a step
    assert found.seconds(24) == (5e-6, 1e-6)


def test_a_library_whose_rows_depend_on_their_batch(monkeypatch):
    """In one bucket alone, and at its end."""

    def varies(x, weight, y):
        row_by_row(x, weight, y)
        if len(x) == 8:
            y.view(torch.int16)[-1, 0] ^= 1

    _, clock = with_library(monkeypatch, varies)
    found = tune(NARROW, INTERPRETED, (1, 24), clock, footprint=1)
    assert found.chosen.kernel == "triton"
    assert found.refused == ("cublas: a row has other bits than among other rows",)


def test_a_library_that_is_not_there_or_not_told_apart(monkeypatch):
    def missing(x, weight, y):
        raise NotImplementedError("no such\nlibrary")

    _, clock = with_library(monkeypatch, missing)
    assert tune(NARROW, INTERPRETED, (1, 24), clock, footprint=1).refused == (r"cublas: 'no such\nlibrary'",)
    (why,) = tune(NARROW, INTERPRETED, (1, 16), clock, footprint=1).refused
    assert "steps of up to 24 rows, and these are 16" in why


def test_sparse_products_are_two_of_four(device):
    weight = Product(LinearFormat.parse("bf16-sparse"), "bf16", 64, 126, torch.bfloat16).weight(device)
    assert is_two_of_four(weight)
    assert 0.45 < (weight.codes != 0).float().mean() < 0.55


def test_a_tape_launches_what_was_measured(tmp_path):
    """cuBLAS's place taken by torch's product on the CPU: for the shape that names it, and no other."""
    model, usual = model_of(tmp_path), CudaBackend(INTERPRETED)
    products = usual.products(model, [Formats()])
    one = next(each for each in products if each.dtype == torch.bfloat16 and each.form.number == "bf16")
    measured = Tuned("made", {one.name: TunedLinear(Order(64), {}, "cublas")})
    session = CudaBackend(dataclasses.replace(INTERPRETED, tuned=measured)).session(model, 32)
    launched = [launch.func for launch in next(iter(session._tapes.values())).tape.launches]
    assert launched.count(cublas) > 0
    assert launched.count(linear) > 0
    batch = Batch.of([[5, 6, 7]])
    expected = usual.session(model, 32).score(batch)
    np.testing.assert_allclose(session.score(batch), expected, atol=0.02 * np.abs(expected).max())


def test_fp8_products_go_through_scaled_mm_where_it_was_measured(tmp_path, monkeypatch):
    """Every one into bfloat16 of the shapes that name it, of rows that the kernels rounded; the others, and all without the measurement,
    through Triton's. Torch has the product on the CPU too."""
    (config,) = (family.examples[0] for family in all_families() if family.name == "llama")
    make_checkpoint({**config, "hidden_size": 64, "intermediate_size": 128}, tmp_path)
    model, formats = load(tmp_path), Formats("fp8", "fp8")
    usual = CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)
    products = usual.products(model, [formats])
    assert {(str(each.form), each.fed) for each in products} == {("fp8", "fp8")}
    named = [each for each in products if each.dtype == torch.bfloat16]
    measured = Tuned("made", {each.name: TunedLinear(Order(64), {}, "scaled_mm") for each in named})
    session = CudaBackend(dataclasses.replace(usual.on, tuned=measured)).session(model, 32, formats)
    plain = usual.session(model, 32, formats)

    def launched(its):
        return [launch.func for launch in next(iter(its._tapes.values())).tape.launches]

    count = sum(isinstance(unit.parts[0], ops.Linear) for unit in units_of(session.program))
    assert (launched(session).count(scaled_mm), launched(session).count(linear)) == (count - 1, 1)  # the head's logits are float32
    assert (launched(plain).count(scaled_mm), launched(plain).count(linear)) == (0, count)
    batch = Batch.of([[5, 6, 7]])
    expected = plain.score(batch)
    np.testing.assert_allclose(session.score(batch), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("us", "kernel"), [(1e-6, "scaled_mm"), (9e-6, "triton")])
def test_scaled_mm_is_chosen_where_it_wins(us, kernel, monkeypatch):
    """Of rows and weights in fp8, row by row in its place, so that it is invariant for certain."""
    (place,) = (number for number, each in enumerate(LINEAR) if each.name == "scaled_mm")
    default_alone(monkeypatch)
    said = []

    def planted(x, weight, y, *, scale=None, bias=None):
        said.append(len(x))
        for row in range(len(x)):
            scaled_mm(x[row : row + 1], weight, y[row : row + 1], scale=scale[row : row + 1])

    def clock(device, work):
        del said[:]
        work()
        return us if said else 5e-6

    monkeypatch.setattr(tuning, "LINEAR", [*LINEAR[:place], dataclasses.replace(LINEAR[place], launch=planted), *LINEAR[place + 1 :]])
    found = tune(Product(LinearFormat.parse("fp8"), "fp8", 32, 64, torch.bfloat16), INTERPRETED, (1, 24), clock, footprint=1)
    assert found.chosen.kernel == kernel
    assert found.seconds(24) == (5e-6, min(us, 5e-6))
    assert found.product.name == "fp8 × fp8 32 × 64"


def two_of_four(dense):
    """The same without the smaller two of any four inputs."""
    fours = np.array(dense, np.float32).reshape(dense.shape[0], -1, 4)
    fours[np.argsort(np.argsort(np.abs(fours), -1), -1) < 2] = 0
    return fours.reshape(dense.shape)


def test_a_tape_compresses_what_is_two_of_four(tmp_path, monkeypatch):
    """Without a device in the layout that torch makes on the CPU, and by a product with what that means."""
    (config,) = (family.examples[0] for family in all_families() if family.name == "llama")
    make_checkpoint({**config, "hidden_size": 64, "intermediate_size": 128}, tmp_path)
    model = load(tmp_path)
    pruned = {
        name: Weight(weight.shape, np.dtype(np.float32), lambda weight=weight: two_of_four(weight.load()))
        for name, weight in model.weights.items()
        if ".up" in name or ".gate" in name
    }
    model = dataclasses.replace(model, weights=Weights({**model.weights, **pruned}))
    on_device = torch.cuda.is_available()
    if not on_device:
        sparse = torch.sparse.SparseSemiStructuredTensor
        monkeypatch.setattr(sparse, "_FORCE_CUTLASS", True)
        monkeypatch.setattr(sparse, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None))
        stand_in = dataclasses.replace(LINEAR[2], launch=lambda x, weight, y, **_: y.copy_(x @ weight.codes.to_dense().T))
        monkeypatch.setattr(tape, "LINEAR", [*LINEAR[:2], stand_in, LINEAR[3]])
    usual = CudaBackend() if on_device else CudaBackend(INTERPRETED)
    shapes = [each for each in usual.products(model, [Formats("bf16-sparse")]) if each.dtype == torch.bfloat16]
    measured = Tuned("made", {each.name: TunedLinear(Order(64), {}, "semi_structured") for each in shapes})
    session = CudaBackend(dataclasses.replace(usual.on, tuned=measured)).session(model, 32, Formats("bf16-sparse"))
    expected = usual.session(model, 32, Formats("bf16-sparse"))
    made = [weight for weight in session.weights._linear.values() if weight.layout == "two_of_four"]
    assert {weight.out for weight in made} == {256}  # gates and ups side by side; queries, keys and values kept all their weights
    assert session.weights.nbytes < expected.weights.nbytes
    batch = Batch.of([[5, 6, 7, 8, 9]])
    whole = expected.score(batch)
    np.testing.assert_allclose(session.score(batch), whole, atol=0.02 * np.abs(whole).max())
    assert len(session._tapes) == 2  # the second was compiled of what the first had compressed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of two of four are a device's")
def test_libraries_on_a_device():
    """What is chosen may be either; what was timed had the same bits in every bucket, what was not says why."""
    for name in ("bf16", "bf16-sparse"):
        found = tune(Product(LinearFormat.parse(name), "bf16", 4096, 4096, torch.bfloat16), CudaBackend().on, (1, 2048))
        told = [each for each in found.timings if each.kernel != "triton"]
        assert {each.kernel for each in told} >= {"cublas"} | ({"semi_structured"} if "sparse" in name else set())
        assert all((each.seconds is None) == bool(each.refused) for each in told)


# --- the command


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    """'cuda' is the interpreter, in whose cache directory nothing was measured yet."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    monkeypatch.setattr(tuning, "graph_seconds", made_clock())
    monkeypatch.setattr(tuning, "FOOTPRINT", 1)  # and there are few trials, each of which takes long there
    monkeypatch.setattr(tuning, "orders", lambda weight: [default_order(weight), Order(default_order(weight).step, 3)])
    monkeypatch.setattr(tuning, "tiles_for", lambda rows, order: [Tiles(rows=16, stages=6)])


def test_what_is_written_is_read_back_and_played(interpreted, tmp_path, monkeypatch, capsys):
    model = model_of(tmp_path / "model")
    ran = main(monkeypatch, capsys, "tune", tmp_path / "model", "--weights", "bf16,int8", "--rows", "1,16", "--json")
    assert ran.code == 0, ran.err
    facts = [json.loads(line) for line in ran.out.splitlines()]
    on = CudaBackend(INTERPRETED)
    assert [each["product"] for each in facts] == [each.name for each in on.products(model, [Formats("bf16"), Formats("int8")])]
    kept = read(tmp_path / "cache" / "tuned", "interpreter")
    for each in facts:
        its = kept.linear[each["product"]]
        assert its.kernel == each["kernel"] == "triton"
        assert {"step": its.order.step, "parts": its.order.parts} == each["order"]
        for rows, told in each["rows"].items():
            assert Tiles(**told["tiles"]) == its.tiles[int(rows)]
    tuned = CudaBackend(module.Device(INTERPRETED.device, INTERPRETED.capability, kept))
    assert f"block sizes measured for {len(facts)} shapes" in tuned.described()
    ids = [5, 6, 7, 8, 9]
    whole = tuned.session(model, 32).score(Batch.of([ids]))
    usual = on.session(model, 32).score(Batch.of([ids]))
    np.testing.assert_allclose(whole, usual, atol=0.02 * np.abs(usual).max())
    alone = tuned.session(model, 32).score(Batch.of([ids[:1]]))
    assert np.array_equal(alone[0], whole[0])


def test_the_table_and_a_second_model_beside_the_first(interpreted, tmp_path, monkeypatch, capsys):
    model_of(tmp_path / "model")
    elsewhere = Tuned("interpreter", {"int4 × bf16 1 × 1": TunedLinear(Order(64))})
    monkeypatch.setattr(module, "find_device", lambda: module.Device(INTERPRETED.device, INTERPRETED.capability, elsewhere))
    ran = main(monkeypatch, capsys, "tune", tmp_path / "model", "--rows", "1")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].split() == ["product", "rows", "default", "µs", "µs", "order", "tiles"]
    assert ran.out.splitlines()[-1] == f"kept in {tmp_path / 'cache' / 'tuned' / 'interpreter.json'}"
    kept = read(tmp_path / "cache" / "tuned", "interpreter").linear
    assert "int4 × bf16 1 × 1" in kept
    assert len(kept) == len(ran.out.splitlines()) - 1


def test_without_a_place_to_keep_it(interpreted, monkeypatch):
    monkeypatch.setattr(module, "tuned_directory", lambda: None)
    with pytest.raises(ConfigError, match="HASTEN_CACHE"):
        CudaBackend(INTERPRETED).tuned_path()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_wrong_arguments_and_no_device(monkeypatch, capsys):
    assert_refused(main(monkeypatch, capsys, "tune", "code-8m"), "needs an NVIDIA GPU", "--backend cpu")
    assert_refused(main(monkeypatch, capsys, "tune", "code-8m", "--rows", "0"), "rows is '0'")
    monkeypatch.setattr(module, "find_device", lambda: INTERPRETED)
    assert_refused(main(monkeypatch, capsys, "tune", "code-8m", "--weights", "int9"), "int9")


def test_products_of_a_program_need_no_weights():
    program = CudaBackend(INTERPRETED).program(random_model("tinyllama-1.1b"))
    assert {product.heads for product in products_of(program)} == {1}
