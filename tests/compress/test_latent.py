"""Latent attention made of grouped: exact where the row holds all there is, near where it does not, and played, saved and counted like
any model."""

import dataclasses

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from hasten.backends.cpu import CpuBackend
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load_directory, save
from hasten.checkpoint.save import unread_elsewhere
from hasten.cli.convert import short_form
from hasten.compress.blocks import Live, Played
from hasten.compress.convert.latent import Latent, factored
from hasten.compress.convert.layerwise import Layer
from hasten.compress.convert.pairs import Pairs, principal
from hasten.compress.convert.statistics import Statistics, lowest
from hasten.compress.gates import require_smaller
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.formats.weights import Weight, Weights
from hasten.model import Source
from hasten.program import Batch, lower
from hasten.spec import Attention, LatentAttention, Llama3Scaling, Rotary, SlidingWindow, Yarn
from tests.compress.models import native_error, random_weights, small, windows_for

LLAMA = next(family for family in all_families() if family.name == "llama")


def convert(model, tmp_path, **settings):
    (step,) = recipe_of([{"latent": settings}])
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, windows_for(model), Run(tmp_path / "work", 2))


def with_weights(model, changed):
    weights = {**model.weights, **{name: Weight(a.shape, a.dtype, lambda a=a: a) for name, a in changed.items()}}
    return dataclasses.replace(model, weights=Weights(weights))


def with_mixers(model, **changes):
    blocks = tuple(msgspec.structs.replace(block, mixer=msgspec.structs.replace(block.mixer, **changes)) for block in model.spec.blocks)
    return random_weights(msgspec.structs.replace(model.spec, blocks=blocks).checked(), seed=4)


def away(model, other, seed=1):
    ids = np.random.default_rng(seed).integers(0, model.spec.vocab, 30).tolist()
    a, b = model.logits(ids), other.logits(ids)
    assert np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(a).max()


def of_rank(model, rank, rotated, seed=5):
    """``model`` whose values and whose keys' features that are not rotated are maps of ``rank`` features together; and of whose rotated
    pairs, where not ``rotated``, each head's are the first head's, turned and scaled."""
    random, changed = np.random.default_rng(seed), {}
    for index, block in enumerate(model.spec.blocks):
        mixer: Attention = block.mixer
        dims, path = mixer.position.dims, f"blocks.{index}.mixer"
        free = mixer.head_dim - dims
        size = mixer.kv_heads * (free + mixer.value_dim)
        made = random.normal(size=(size, rank)) @ random.normal(size=(rank, model.spec.width)) / (rank * model.spec.width) ** 0.5
        k = model.weights.array(f"{path}.k.weight").reshape(mixer.kv_heads, mixer.head_dim, -1).copy()
        if not rotated:
            pairs = k[0, : dims // 2] + 1j * k[0, dims // 2 : dims]
            for head in range(1, mixer.kv_heads):
                turned = pairs * (random.normal(size=(dims // 2, 1)) + 1j * random.normal(size=(dims // 2, 1)))
                k[head, :dims] = np.concatenate([turned.real, turned.imag])
        k[:, dims:] = made[: mixer.kv_heads * free].reshape(mixer.kv_heads, free, -1)
        changed[f"{path}.k.weight"] = k.reshape(-1, model.spec.width).astype(np.float32)
        changed[f"{path}.v.weight"] = made[mixer.kv_heads * free :].astype(np.float32)
    return with_weights(model, changed)


@pytest.mark.parametrize("fit", [False, True])
def test_what_is_exactly_of_the_rank_becomes_the_same_function(fit, tmp_path):
    model = of_rank(small(), rank=9, rotated=False)
    made = convert(model, tmp_path, rank=9, rope_dim=12, fit=fit)
    for block in made.spec.blocks:
        assert isinstance(block.mixer, LatentAttention)
        assert (block.mixer.kv_rank, block.mixer.rope_dim, block.mixer.norm) == (9, 12, None)
    assert away(model, made) < 1e-4
    assert away(model, convert(model, tmp_path, rank=8, rope_dim=12, fit=fit)) > 1e-3
    assert away(model, convert(model, tmp_path, rank=9, rope_dim=10, fit=fit)) > 1e-3


SCALED = {
    "interleaved": Rotary(base=100.0, dims=12, interleaved=True),
    "llama3": Rotary(
        base=100.0, dims=20, scaling=Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=64)
    ),
    "yarn": Rotary(base=100.0, dims=16, scaling=Yarn(factor=4.0, original_context=32, attention_factor=1.3)),
}


@pytest.mark.parametrize("kind", SCALED)
def test_every_pair_of_every_head_may_stay_rotated(kind, tmp_path):
    """Two heads' pairs of one frequency take two places of that frequency: nothing is lost, whatever the frequencies are."""
    position = SCALED[kind]
    model = with_mixers(small(), position=position)
    rank = 2 * (20 - position.dims) + 39  # else the row would be as long as what it replaces
    if position.dims == 20:
        values = model.weights.array("blocks.0.mixer.v.weight")
        model = with_weights(model, {f"blocks.{index}.mixer.v.weight": np.concatenate([values[:39], values[:1]]) for index in range(2)})
    else:
        model = of_rank(model, rank, rotated=True)
    made = convert(model, tmp_path, rank=rank, rope_dim=2 * position.dims, fit=False)
    assert away(model, made) < 1e-4


def test_more_features_are_nearer_and_a_fit_is_nearer_yet(tmp_path):
    model = small()
    shares = {}
    for rank, rope in ((60, 18), (30, 12), (30, 4), (10, 4)):
        evidence = convert(model, tmp_path, rank=rank, rope_dim=rope).provenance[-1].evidence
        shares[rank, rope] = evidence["output_error"]["layer 0"]
        assert shares[rank, rope][1] < shares[rank, rope][0]
    assert shares[60, 18][1] < shares[30, 12][1] < shares[30, 4][1] < shares[10, 4][1]


def test_the_pairs_that_stay_rotated_are_those_that_matter():
    """Only pair 3 of one head asks and answers: it stays rotated, at its own frequency."""
    import torch

    mixer = Attention(heads=2, kv_heads=2, head_dim=8, value_dim=4, scale=0.3, position=Rotary(base=10.0, dims=8))
    kv, queries = torch.eye(24, dtype=torch.float64) * 1e-3, torch.eye(8, dtype=torch.float64).repeat(2, 1, 1) * 1e-3
    kv[11, 11] = kv[15, 15] = 5.0  # head 1, features 3 and 7
    queries[1, 3, 3] = queries[1, 7, 7] = 5.0
    random = np.random.default_rng(0)
    shapes = {"q": (16, 6), "k": (16, 6), "v": (8, 6), "o": (6, 8)}
    weights = {f"blocks.0.mixer.{n}.weight": torch.from_numpy(random.normal(size=s).astype(np.float32)) for n, s in shapes.items()}
    played = Played(lower(small().spec), Live({}), (), 1)
    layer = Layer(0, mixer, weights, Statistics(kv, torch.zeros(24, dtype=torch.float64), queries), played, played)
    made = factored(layer, 6, 2, 100).mixer
    assert made.rotary.base / made.rotary.scaling.divisors[0] == pytest.approx(10.0 * 10.0 ** (-6 / 8))


def test_principal_pairs_are_those_of_a_singular_value_decomposition():
    import torch

    random = np.random.default_rng(2)
    mixer = Attention(heads=3, kv_heads=3, head_dim=4, value_dim=4, scale=1.0, position=Rotary(base=10.0, dims=4))
    x = random.normal(size=(200, 3, 4)) * [[[1], [2], [0.5]]]
    flat, weight = torch.from_numpy(x.reshape(200, 12)), torch.from_numpy(random.uniform(0.1, 2, size=(2, 3)))
    columns, energy = principal(Pairs.of(mixer).moments(flat.T @ flat), weight)
    for pair in range(2):
        scaled = (x[:, :, pair] + 1j * x[:, :, pair + 2]) * weight[pair].sqrt().numpy()
        expected = np.linalg.svd(scaled, compute_uv=False) ** 2
        assert np.allclose(energy[pair].numpy(), expected)
        w = columns[pair].numpy()
        assert np.allclose((np.abs(w) ** 2).mean(0), 1)
        z = np.linalg.inv(w) @ (x[:, :, pair] + 1j * x[:, :, pair + 2]).T
        left = (x[:, :, pair] + 1j * x[:, :, pair + 2]).T - w[:, :1] @ z[:1]
        assert (np.abs(left * weight[pair].sqrt().numpy()[:, None]) ** 2).sum() == pytest.approx(expected[1:].sum())


def test_the_lowest_error_is_the_tail_of_a_singular_value_decomposition():
    import torch

    random = np.random.default_rng(3)
    x, roots = random.normal(size=(300, 9)) @ random.normal(size=(9, 9)), [random.normal(size=(n, n)) for n in (4, 5)]
    metrics = [torch.from_numpy(root @ root.T + 0.1 * np.eye(len(root))) for root in roots]
    encode, decode = lowest(torch.from_numpy(x.T @ x), metrics, 3)
    left = x - x @ (decode @ encode).numpy().T
    metric = torch.block_diag(*metrics).numpy()
    lower_root = np.linalg.cholesky(metric)
    expected = (np.linalg.svd(x @ lower_root, compute_uv=False)[3:] ** 2).sum()
    assert np.einsum("ti,ij,tj->", left, metric, left) == pytest.approx(expected)


def test_cache_bytes_are_what_was_promised_and_what_the_engine_takes(tmp_path):
    model = small()
    made = convert(model, tmp_path, rank=24, rope_dim=8)
    before, after = made.provenance[-1].evidence["cache_bytes_per_token"]
    assert (before, after) == (2 * 2 * 2 * 20 * 2, 2 * 32 * 2)
    for each, bytes_a_token in ((model, before), (made, after)):
        session = CpuBackend().session(each, 192)
        pages = sum(pool.page_bytes for pool in session.compiled.pools)
        assert pages == bytes_a_token * session.page
        assert sum(group.bytes_per_token() for group in session.program.states) == bytes_a_token
    assert require_smaller(model, made).what == "the cache of a whole sequence"


def test_natively_it_is_the_same_model_and_the_same_bits_in_pieces(tmp_path):
    made = convert(small(), tmp_path, rank=24, rope_dim=8)
    ids = np.random.default_rng(0).integers(0, made.spec.vocab, 50).tolist()
    assert native_error(made, ids) < 1.2
    stepper = Stepper(CpuBackend().session(made))
    whole, state, rows = stepper.score(Batch.of([ids])), stepper.start(1), []
    for begin in range(0, 50, 9):
        logits, state = stepper.step(Batch.of([ids[begin : begin + 9]], [begin]), state)
        rows.append(logits)
    assert np.array_equal(np.concatenate(rows), whole)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = LLAMA.examples[0]
    model = dataclasses.replace(random_weights(LLAMA.spec(config)), source=Source("llama", config))
    made = convert(model, tmp_path, rank=10, rope_dim=4, layers=[1])
    assert isinstance(made.spec.blocks[0].mixer, Attention)
    assert "llama does not describe" in unread_elsewhere(made)
    save(made, tmp_path / "out")
    again = load_directory(tmp_path / "out", "again")
    assert again.spec == made.spec
    assert again.provenance == made.provenance
    ids = np.random.default_rng(0).integers(0, 97, 17).tolist()
    assert np.array_equal(again.logits(ids), made.logits(ids))


def test_gradients_reach_every_weight(tmp_path):
    import torch

    from hasten.backends.reference import play
    from hasten.backends.reference.play import weights_of

    made = convert(small(), tmp_path, rank=24, rope_dim=8)
    program = lower(made.spec, context=32)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights_of(program, made.weights).items()}
    (logits,) = play(program, weights, Batch.of([list(range(20))]))[0].values()
    logits.square().mean().backward()
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank": 80}, "rank is 80; layer 0 has 80 features"),
        ({"rank": 70, "rope_dim": 10}, "make a row of 80 features, and layer 0 keeps 80 now: no smaller"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 8, "rope_dim": 3}, "rope_dim is 3; layer 0 can keep an even number of rotated features, from 2 to 24"),
        ({"rank": 8, "rope_dim": 26}, "from 2 to 24"),
        ({"rank": 8, "rope_dim": 0}, "rope_dim is 0"),
        ({"rank": 8, "layers": [0, 9]}, "layers: 9 is none of"),
        ({"rope_dim": 8}, "settings are rank, rope_dim, layers, fit"),
    ],
)
def test_sizes_that_cannot_work_are_refused_first(settings, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        convert(small(), tmp_path, **settings)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"position": None}, "no rotary positions"),
        ({"visible": SlidingWindow(size=9)}, "a window"),
        ({"bias": True}, "biases on its queries"),
        ({"out_bias": True}, "a bias on its output"),
        ({"softcap": 3.0}, "capped scores"),
        ({"sinks": True}, "sinks"),
        ({"gate": True}, "a gate"),
        ({"clip": 1.0}, "projections that are clipped"),
    ],
)
def test_kinds_that_cannot_are_refused(fields, reason, tmp_path):
    with pytest.raises(UnsupportedError, match=reason):
        convert(with_mixers(small(), **fields), tmp_path, rank=8)


def test_half_of_a_heads_rotated_features_stay_unless_told_otherwise():
    mixer = small().spec.blocks[0].mixer
    assert Latent(rank=8).turned(mixer) == 6
    assert Latent(rank=8, rope_dim=10).turned(mixer) == 10


def test_the_command_is_short_for_a_recipe():
    assert short_form(1, None, None, None, False, False, None) == [{"kv_heads": {"count": 1}}]
    assert short_form(None, 96, 32, None, False, False, "0, 2") == [{"latent": {"rank": 96, "rope_dim": 32, "layers": [0, 2]}}]
    assert short_form(None, None, None, 256, False, False, "1") == [{"window": {"size": 256, "layers": [1]}}]
    assert short_form(None, None, None, None, False, True, None) == [{"share_kv": {}}]
    for wrong, reason in (
        ((None, None, None, None, False, False, None), "0 conversions are asked for"),
        ((1, 96, None, None, False, False, None), "2 conversions"),
        ((1, None, 32, None, False, False, None), "goes with --latent only"),
        ((1, None, None, None, False, False, "x"), "--layers is"),
        ((None, None, None, None, False, True, "-1"), "--layers is"),
    ):
        with pytest.raises(ConfigError, match=reason):
            short_form(*wrong)


def test_the_command_writes_what_loads(tmp_path):
    from hasten.cli.app import app

    config = LLAMA.examples[0]
    save(dataclasses.replace(random_weights(LLAMA.spec(config)), source=Source("llama", config)), tmp_path / "in")
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--latent", "12", "--rope-dim", "4", "--samples", "8", "--no-speed"]
    )
    assert result.exit_code == 0, result.output
    assert "the cache of a whole sequence 8,192 → 4,096 bytes (0.500)" in result.output
    assert "cache 128 → 64 bytes a token, kept in bf16" in result.output
    assert "transformers does not load what was written" in result.output
    assert {type(block.mixer) for block in load_directory(tmp_path / "out", "out").spec.blocks} == {LatentAttention}
