"""Vectors of a model with two Programs, by the length of the sequence: a text's bits are its own, whatever came with it."""

import numpy as np
import pytest

from hasten import LLM
from hasten.checkpoint import load
from hasten.families import phi3
from hasten.serve.messages import Embed
from hasten.serve.vectors import Vectors
from tests.families.oracles import make_checkpoint


@pytest.fixture
def llm(tmp_path):
    config = next(config for config in phi3.FAMILY.examples if "original_max_position_embeddings" in config)
    make_checkpoint(config, tmp_path)
    return LLM(load(tmp_path), backend="cpu")


def embedded(llm, prompts: list[list[int]]) -> list[bytes]:
    vectors = Vectors(llm)
    assert vectors.take(Embed(1, prompts)) == []
    found = {}
    while vectors.busy:
        for one in vectors.step():
            assert one.error is None
            found[one.place] = one.data
    return [found[place] for place in range(len(prompts))]


def test_a_short_text_beside_a_long_one_has_the_bits_it_has_alone(llm):
    short = llm.preparer.contexts[0]
    texts = [[1, 2, 3, 4], list(range(1, short + 9)), [7] * short, [5] * (short + 1)]
    alone = [embedded(llm, [text])[0] for text in texts]
    assert embedded(llm, texts) == alone
    assert all(np.frombuffer(one, "<f4").any() for one in alone)
