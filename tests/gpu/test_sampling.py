"""Tokens drawn on the device against the engine's own sampler: the same, whatever the settings; and its arithmetic, to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hasten import _native
from hasten.backends.cuda import drawing as plain
from hasten.backends.cuda.drawing import Wanted, drawing
from hasten.backends.cuda.kernels import sampling
from hasten.backends.cuda.kernels.noise import LOWER_HALF, mass_of, natural_log, noise_words, uniform
from hasten.backends.cuda.kernels.sampling import Scratch, default_parts, sample
from hasten.engine.sampler import Sampler, native_row
from hasten.engine.sampling import Purpose, SamplingParams

INF = np.inf
SEEDS = (0, 7, 2**32 - 1, 2**32, 1234567890123456789, 2**63 - 1)


def rows_of(settings, seed=11):
    """Wanted rows, each with a key of its own."""
    return [
        Wanted(seed=SEEDS[i % len(SEEDS)] + (seed if i % 6 == 1 else 0), choice=i % 3, position=seed * 1000 + i, **its)
        for i, its in enumerate(settings)
    ]  # fmt: skip


def engine_tokens(logits, rows):
    """The native sampler's tokens; −1 where it has an error."""
    names = ("temperature", "top_k", "top_p", "min_p")
    native = [native_row(SamplingParams(**{name: getattr(row, name) for name in names}), [], row.seed, row.choice) for row in rows]
    vocab = logits.shape[1]
    masks = np.stack([np.full(-(-vocab // 32), 2**32 - 1, np.uint32) if row.mask is None else row.mask for row in rows])
    tokens, positions = np.full(len(rows), -99, np.int32), np.array([row.position for row in rows])
    try:
        _native.Sampler(None).sample(logits, native, positions, tokens, masks=masks, purpose=Purpose.TOKEN)
    except ValueError:
        assert (tokens == -1).any()
    return tokens.tolist()


def poisoned(scratch):
    for field in dataclasses.fields(scratch):
        its = getattr(scratch, field.name)
        its.fill_(float("nan") if its.is_floating_point() else -(2**30))
    return scratch


def device_tokens(device, logits, rows, *, bucket=0, parts=1, bits=8, block=1024, searches=None):
    vocab, bucket = logits.shape[1], bucket or len(rows)
    made = drawing(rows, bucket, vocab)
    masks = np.full((bucket, -(-vocab // 32)), 0x5A5A5A5A, np.int32) if made.masks is None else made.masks
    filled = torch.full((bucket, vocab), float("nan"))
    filled[: len(rows)] = torch.from_numpy(logits)
    tokens, scratch = torch.full((bucket,), -77, dtype=torch.int32, device=device), poisoned(Scratch.of(bucket, parts, device, bits=bits))
    top_k, top_p = searches or (made.top_k, made.top_p)
    settings, masks = (torch.from_numpy(each).to(device) for each in (made.settings, masks))
    sample(filled.to(device), masks, settings, tokens, scratch, top_k=top_k, top_p=top_p, block=block)
    return tokens.tolist(), scratch


def logits_of(seed, rows, vocab, kind="normal"):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    if kind == "ties":
        x = np.round(x / 2) * np.float32(2)  # a handful of values, 0 and −0 among them
    elif kind == "infinities":
        x[rng.random(x.shape) < 0.6] = -INF
        x[:, 0] = 1.5
    return x


def bits_of(allowed, vocab):
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def settings_of(vocab, seed):
    """Seven rows: greedy, plain, every limit alone and together, hot, cold, masked."""
    rng = np.random.default_rng(seed)
    some = bits_of(np.flatnonzero(rng.random(vocab) < 0.3).tolist() or [vocab - 1], vocab)
    return [
        {"mask": some},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": max(1, vocab // 3), "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.5, "top_p": 0.9, "mask": some},
        {"temperature": 50.0, "top_k": 4},
        {"temperature": 1e-3, "top_p": 0.5},
        {"temperature": 4.0, "min_p": 0.4, "mask": some},
    ]


@pytest.mark.parametrize(
    ("vocab", "kind", "parts", "block"),
    [(1, "normal", 1, 16), (31, "ties", 1, 32), (33, "ties", 2, 32), (1000, "infinities", 1, 1024), (5003, "normal", 2, 4096)],
)
def test_tokens_are_the_engines(device, vocab, kind, parts, block):
    logits, rows = logits_of(vocab, 7, vocab, kind), rows_of(settings_of(vocab, vocab))
    tokens, _ = device_tokens(device, logits, rows, parts=parts, block=block)
    assert tokens == engine_tokens(logits, rows)
