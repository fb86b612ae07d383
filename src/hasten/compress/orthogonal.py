"""Orthogonal matrices that spread what stands in few features over all of them, kept as factors, so that applying one costs few passes."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hasten.formats.linear import Floats
from hasten.formats.weights import Array

BLOCK = 1 << 22  # elements turned together


@dataclasses.dataclass(frozen=True, slots=True)
class Rotation:
    """Q = diag(``signs``) · (S ⊗ ``block``), S Sylvester's Hadamard matrix over √order, of as many rows as make Q [size, size]."""

    signs: Floats
    block: Floats
    kind: str

    @property
    def size(self) -> int:
        """Of the rows it turns."""
        return len(self.signs)

    def apply(self, x: Array) -> Floats:
        """x · Q, float32; of x [..., n · size] every run of ``size`` for itself.

        Sums are elementwise in one order, so the bits depend on x alone."""
        rows, made = x.reshape(-1, self.size), np.empty((x.size // self.size, self.size), np.float32)
        step = max(1, BLOCK // self.size)
        for begin in range(0, len(rows), step):
            made[begin : begin + step] = self._turned(rows[begin : begin + step].astype(np.float32) * self.signs)
        return made.reshape(x.shape)

    def apply_to_outputs(self, x: Array) -> Floats:
        """Qᵀ · x for x [..., n · size, inputs]: a product whose outputs are turned, every run of ``size`` for itself."""
        return np.swapaxes(self.apply(np.ascontiguousarray(np.swapaxes(x, -1, -2))), -1, -2)

    def _turned(self, x: Floats) -> Floats:
        small = len(self.block)
        count, half = self.size // small, 1
        x = x.reshape(len(x), count, small)
        if small > 1:
            parts = np.zeros_like(x)
            for index in range(small):
                parts += x[..., index, None] * self.block[index]
            x = parts
        while half < count:
            pairs = x.reshape(len(x), count // (2 * half), 2, half * small)
            x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            half *= 2
        return (x * np.float32(count**-0.5)).reshape(len(x), self.size)


def rotation(size: int, seed: int) -> Rotation:
    """A randomized Hadamard matrix of ``size`` rows: every element is ±1/√size, signs drawn from ``seed``.

    Sylvester's has a power of two of rows; times an order that Paley's constructions have over a prime field (12, 20, 28, 36, 44, 60 …) it
    covers the widths that models have. For a size that none of them divides, the odd part is a random orthogonal matrix (QR of normal
    numbers): as orthogonal, but its elements are not all equally large, so it spreads a little less evenly."""
    random = np.random.default_rng(seed)
    signs = random.choice(np.array([-1, 1], np.float32), size)
    odd = size // (size & -size)
    if odd == 1:
        return Rotation(signs, np.ones((1, 1), np.float32), "Hadamard")
    order = 4 * odd
    while size % order == 0:
        if (found := paley(order)) is not None:
            return Rotation(signs, (found / np.sqrt(order)).astype(np.float32), "Hadamard")
        order *= 2
    q, r = np.linalg.qr(random.standard_normal((odd, odd)))
    return Rotation(signs, (q * np.sign(np.diagonal(r))).astype(np.float32), "Hadamard times random orthogonal")


def paley(order: int) -> NDArray[np.int64] | None:
    """A Hadamard matrix H, H · Hᵀ = order · I, by Paley's constructions (1933) over a prime field; None where there is none."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        return np.eye(order, dtype=np.int64) + _conference(order - 1, -1)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        first, second = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(_conference(half - 1, 1), first) + np.kron(np.eye(half, dtype=np.int64), second)
    return None


def _conference(q: int, corner: int) -> NDArray[np.int64]:
    """[[0, 1], [corner, χ(i − j)]] [q + 1, q + 1], χ the quadratic character of the integers modulo the prime q."""
    character = np.full(q, -1, np.int64)
    character[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    character[0] = 0
    places = np.arange(q)
    made = np.zeros((q + 1, q + 1), np.int64)
    made[0, 1:], made[1:, 0] = 1, corner
    made[1:, 1:] = character[(places[:, None] - places) % q]
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, int(number**0.5) + 1))
