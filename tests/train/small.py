"""A small random model and text for tests of training."""

from pathlib import Path

import numpy as np
import torch
import transformers

from hasten.train import Batches, Example, Settings, Steps

VOCAB = 97
IDS = np.random.default_rng(0).integers(0, VOCAB, 17).tolist()


def small_llama(path: Path, *, layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0) -> Path:
    """A Llama of transformers' own making, saved to ``path``; its weights are large enough that models differ in what they say."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def windows(count: int = 12, seed: int = 0) -> tuple[Example, ...]:
    """Examples of different lengths, every third with a prompt that is not learned."""
    random = np.random.default_rng(seed)
    made = []
    for place, size in enumerate(random.integers(9, 22, count)):
        made.append(Example(tuple(random.integers(0, VOCAB, int(size)).tolist()), 4 if place % 3 == 2 else 1))
    return tuple(made)


BATCHES = Batches(windows(), 4, seed=1)


def settings(steps: int = 6, **changed: object) -> Settings:
    """Few steps at a high rate."""
    return Settings(**{"budget": Steps(steps), "rate": 0.01, "warmup": 0.3, "decay": 0.5} | changed)
