"""Who teaches: its logits are those of the model, however many sequences come at once, and its key is what they depend on."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.checkpoint import load_directory
from hasten.compress.learn import longest
from hasten.compress.teachers import parts_of, scored, teacher_of
from hasten.formats.linear import LinearFormat
from hasten.formats.quantized import QuantizedWeight
from hasten.formats.weights import Weights
from hasten.program import Batch
from hasten.train import Batches, Example
from tests.train.small import VOCAB, small_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_directory(small_llama(tmp_path_factory.mktemp("teacher")), "teacher")


def sequences(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length).tolist() for length in lengths]


def apart(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("lengths", [[16] * 300, [3, 16, 1, 9] * 80, [16]])
def test_it_says_what_the_model_does_of_more_sequences_than_have_pages(model, lengths):
    given = sequences(lengths)
    session = CpuBackend(1).session(model, 16)
    found = scored(session, Batch.of(given))
    whole = ReferenceBackend().session(model, 16).score(Batch.of(given))
    assert found.shape == whole.shape == (sum(lengths), VOCAB)
    assert apart(found, whole) < 3e-2  # it is fed bf16
    assert np.array_equal(found, np.concatenate([session.score(Batch.of([each])) for each in given]))
    parts = [len(part.offsets) - 1 for part in parts_of(session, Batch.of(given))]
    assert sum(parts) == len(given)
    assert (len(parts) > 1) == (len(given) > 64)
    assert np.array_equal(teacher_of(model, 16, 1, "float32").logits(Batch.of(given)).numpy(), found)


def test_learned_positions_are_asked_for_no_further_than_they_reach(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_directory(tmp_path, "gpt2")
    batches = Batches((Example(tuple(range(25))), Example(tuple(range(9)))), 2)
    assert longest(batches) == model.spec.context == 24
    batch = Batch.of([list(example.ids[:-1]) for example in batches.examples])
    found = teacher_of(model, longest(batches), 1, "float32").logits(batch).numpy()
    assert apart(found, ReferenceBackend().session(model, 24).score(batch)) < 3e-2


def test_its_key_is_of_all_that_its_logits_depend_on(model):
    def stored(activations):
        form = LinearFormat.parse("int8")
        names = [name for name in model.weights if name.endswith(("up.weight", "q.weight"))]
        rounded = {name: QuantizedWeight.from_array(model.weights[name].load(), form, activations) for name in names}
        return dataclasses.replace(model, weights=Weights({**model.weights, **rounded}))

    keys = [teacher_of(each, 16, 1, "float32").key for each in (model, stored("bf16"), stored("int8"))]
    assert len(set(keys)) == 3
    assert teacher_of(stored("int8"), 16, 1, "float32").key == keys[2]
