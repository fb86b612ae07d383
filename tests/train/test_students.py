"""Students cut from their teachers: against transformers' own layers taken out, and what cannot be."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from msgspec import structs

from hasten.base.errors import ConfigError, UserError
from hasten.checkpoint import load, load_directory, save
from hasten.compress import students
from hasten.families import all_families
from hasten.formats.weights import Weight, Weights
from hasten.model import find_tokenizer
from hasten.program import lower
from hasten.spec import Exit, Head, RMSNorm
from tests.train.small import IDS, small_llama


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("llama"), layers=5)


@pytest.mark.parametrize("layers", [(0, 2, 4), (1,), (0, 1, 2, 3, 4)])
def test_it_is_the_model_without_the_other_layers(tmp_path, directory, layers):
    student = students.cut_depth(load_directory(directory, "small"), layers)
    judge = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    judge.model.layers = torch.nn.ModuleList(judge.model.layers[place] for place in layers)
    for place, layer in enumerate(judge.model.layers):
        layer.self_attn.layer_idx = place
    expected = judge(torch.tensor([IDS]), use_cache=False).logits[0].detach()
    np.testing.assert_allclose(student.logits(IDS), expected, atol=1e-4)
    save(student, tmp_path / "out")
    elsewhere = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert elsewhere.config.num_hidden_layers == len(layers)
    np.testing.assert_allclose(elsewhere(torch.tensor([IDS])).logits[0].detach(), expected, atol=1e-4)
    read = load(tmp_path / "out")
    assert read.spec == student.spec
    assert read.provenance[-1].transform == "cut-depth"
    assert read.provenance[-1].settings == {"layers": list(layers)}


def test_an_early_exit_goes_with_its_block(directory):
    model = load_directory(directory, "small")
    norm, head = RMSNorm(eps=1e-5), Head(tied=True)
    spec = structs.replace(model.spec, exits=tuple(Exit(after=after, norm=norm, head=head) for after in (0, 1, 2, 3)))
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in lower(spec).params.items()}
    model = dataclasses.replace(
        model, spec=spec, weights=Weights({name: Weight(each.shape, each.dtype, lambda each=each: each) for name, each in arrays.items()})
    )
    cut = students.cut_depth(model, (1, 3, 4))
    assert [early.after for early in cut.spec.exits] == [0, 1]
    assert set(cut.weights) == set(lower(cut.spec).params)
    assert np.array_equal(cut.weights.array("exits.1.norm.weight"), arrays["exits.3.norm.weight"])
    ended = students.cut_depth(model, (0, 2))  # an exit after the last block is none
    assert [early.after for early in ended.spec.exits] == [0]
    assert set(ended.weights) == set(lower(ended.spec).params)


@pytest.mark.parametrize("layers", [(0, 1, 4), (1, 2, 3), (2, 3), (1,)])
def test_layers_that_share_keep_their_matrices(directory, layers):
    """Blocks 1 and 3 have the matrices of 0: cut, each plays what it played, whoever is left of them."""
    model = load_directory(directory, "small")
    blocks = [structs.replace(block, shares=0 if place in {1, 3} else None) for place, block in enumerate(model.spec.blocks)]
    spec = structs.replace(model.spec, blocks=tuple(blocks))
    shared = dataclasses.replace(model, spec=spec, source=None, weights=Weights({name: model.weights[name] for name in lower(spec).params}))
    cut = students.cut_depth(shared, layers)
    assert set(cut.weights) == set(lower(cut.spec).params)
    plain = dict(model.weights)
    for place in (1, 3):
        plain |= {name: plain[name.replace(f"blocks.{place}.", "blocks.0.")] for name in plain
                  if name.startswith(f"blocks.{place}.") and len(plain[name].shape) > 1}  # fmt: skip
    expected = students.cut_depth(dataclasses.replace(model, weights=Weights(plain)), layers)
    np.testing.assert_allclose(cut.logits(IDS), expected.logits(IDS), atol=1e-5)
    assert len(cut.weights) < len(expected.weights) or len({0, 1, 3} & set(layers)) < 2


@pytest.mark.parametrize("family", [family.name for family in all_families()])
def test_a_config_says_the_cut_or_is_given_up(family):
    """A config that was changed describes the cut Spec; one that cannot say it is left as it was."""
    (found,) = (each for each in all_families() if each.name == family)
    said = 0
    for config in found.examples:
        spec = found.spec(config)
        if len(spec.blocks) < 2:
            continue
        kept = tuple(range(1, len(spec.blocks)))
        cut = structs.replace(spec, blocks=tuple(spec.blocks[place] for place in kept))
        source = students._source(students.Source(found.name, config), cut, kept)
        assert source.config == config or found.spec(source.config) == cut
        said += source.config != config
    assert said or family not in {"llama", "gpt2", "mistral", "gemma3", "gpt_oss", "transfo-xl"}


def test_layers_are_spread_and_paired():
    assert students.spread_layers(8, 4) == (0, 2, 5, 7)
    assert students.spread_layers(8, 8) == tuple(range(8))
    assert students.spread_layers(5, 1) == (0,)
    for blocks in range(1, 20):
        for depth in range(2, blocks + 1):
            made = students.spread_layers(blocks, depth)
            assert len(set(made)) == depth
            assert (made[0], made[-1]) == (0, blocks - 1)
    assert students.pairs_of(4, 8) == ((0, 1), (1, 3), (2, 5), (3, 7))
    assert students.pairs_of(4, 8, (0, 2, 5, 7)) == ((0, 1), (1, 4), (2, 6), (3, 7))
    assert students.pairs_of(3, 3, (0, 1, 2)) == ((0, 0), (1, 1), (2, 2)) == students.pairs_of(3, 3)
    assert students.pairs_of(4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))


@pytest.mark.parametrize("layers", [(), (0, 5), (-1,), (2, 1), (1, 1)])
def test_layers_that_are_not_there(directory, layers):
    with pytest.raises(ConfigError, match="which are 0 to 4"):
        students.cut_depth(load_directory(directory, "small"), layers)


def test_tokenizers_must_be_one(directory, tmp_path):
    teacher = load("code-8m")
    students.check_together(students.cut_depth(teacher, (0, 7)), teacher)
    path = teacher.tokenizer.path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((path.parent / name).read_text())
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    one, two = [word for word in vocabulary if len(word) == 1][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    other = dataclasses.replace(teacher, name="other", tokenizer=find_tokenizer(tmp_path)[0])
    with pytest.raises(UserError, match="code-8m and other have different tokenizers"):
        students.check_together(teacher, other)
    with pytest.raises(UserError, match="no tokenizer"):
        students.check_together(load_directory(directory, "small"), teacher)


def test_a_digest_is_of_the_weights(directory):
    one = load_directory(directory, "one")
    assert students.weights_digest(one) == students.weights_digest(load_directory(directory, "another name"))
    assert students.weights_digest(one) != students.weights_digest(students.cut_depth(one, (0, 1, 2, 3)))
    arrays = dict(one.weights)
    changed = one.weights.array("norm.weight").copy()
    changed[0] += 1
    arrays["norm.weight"] = Weight(changed.shape, changed.dtype, lambda: changed)
    assert students.weights_digest(one) != students.weights_digest(dataclasses.replace(one, weights=Weights(arrays)))
