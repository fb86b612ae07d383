"""Which ids a request has seen, and its logit bias, kept on the device, so that penalties need no token to leave it.

A request that asks for either has a slot. A word an id: how often the output holds it (bits 0 to 19), whether prompt or output does (bit
20), and one more than the place of its bias (bits 21 to 31, 0 for none). What is made of them is step 2 of ``native/src/sampling.hpp``."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

MOST_BIASES = constexpr(1024)
SEEN = constexpr(1 << 20)
BIAS_BITS = constexpr(21)
LARGEST_FLOAT = constexpr(float.fromhex("0x1.fffffep127"))


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """``words`` int32 [S, V] and ``biases`` float64 [S, 1024] of S slots."""

    words: Tensor
    biases: Tensor

    @classmethod
    def of(cls, slots: int, vocab: int, device: torch.device | str) -> Self:
        """Room for ``slots``; each has to ``begin``."""
        biases = torch.empty(slots, MOST_BIASES.value, dtype=torch.float64, device=device)
        return cls(torch.empty(slots, vocab, dtype=torch.int32, device=device), biases)

    @property
    def nbytes(self) -> int:
        """Both together."""
        return self.words.nbytes + self.biases.nbytes

    def begin(self, slot: int, prompt: Sequence[int], output: Sequence[int] = (), bias: Sequence[tuple[int, float]] = ()) -> None:
        """Give ``slot`` to a request with those tokens so far. Not while a step that draws for the slot runs.

        Ids beyond the vocabulary are passed over. Raises ValueError for more than 1024 biases."""
        if len(bias) > MOST_BIASES.value:
            raise ValueError(f"{len(bias)} logit biases are more than {MOST_BIASES.value}")
        vocab = self.words.shape[1]
        before, drawn = (np.array([token for token in tokens if 0 <= token < vocab], np.int64) for tokens in (prompt, output))
        words = np.bincount(drawn, minlength=vocab).astype(np.uint32)
        words[before] |= np.uint32(SEEN.value)
        words[drawn] |= np.uint32(SEEN.value)
        values = np.zeros(MOST_BIASES.value)
        for place, (token, value) in enumerate(bias):
            if 0 <= token < vocab:
                words[token] |= np.uint32((place + 1) << BIAS_BITS.value)
                values[place] = value
        self.words[slot].copy_(torch.from_numpy(words.view(np.int32)))
        self.biases[slot].copy_(torch.from_numpy(values))


@triton.jit
def changed(
    x: tensor,
    words: tensor,
    biases: tensor,
    slot: tensor,
    id: tensor,
    vocab: tensor,
    repetition: tensor,
    presence: tensor,
    frequency: tensor,
) -> tensor:
    """A tile's logits with bias and penalties (float64 scalars), reckoned in float64 and rounded once; as they are for a slot below 0."""
    word = tl.load(words + slot * vocab + id, mask=id < tl.where(slot >= 0, vocab, 0), other=0)
    if tl.max((word != 0).to(tl.int32), axis=0) > 0:
        count, place = (word & (SEEN - 1)).to(tl.float64), (word.to(tl.uint32, bitcast=True) >> BIAS_BITS).to(tl.int32)
        y = x.to(tl.float64) + tl.load(biases + slot * MOST_BIASES + place - 1, mask=place > 0, other=0.0)
        y = tl.where((word & SEEN) != 0, tl.where(y > 0.0, y / repetition, y * repetition), y)
        y -= frequency * count
        y = tl.where(count > 0.0, y - presence, y)
        y = tl.minimum(tl.maximum(y, -LARGEST_FLOAT), LARGEST_FLOAT)
        x = tl.where((word != 0) & (x > -float("inf")), y.to(tl.float32), x)
    return x


@triton.jit
def note(words: tensor, slot: tensor, vocab: tensor, token: tensor) -> None:
    """One more ``token`` in the output of ``slot``."""
    at = words + slot * vocab + token
    tl.store(at, (tl.load(at) | SEEN) + 1)
