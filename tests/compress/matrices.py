"""Weights and inputs with the oddities that real ones have, and slow implementations of what is tested."""

import numpy as np
import torch

from hasten.formats.linear import NUMBERS, LinearFormat


def weight_of(seed, out, size):
    random = np.random.default_rng(seed)
    weight = random.normal(size=(out, size)) * random.uniform(0.05, 2, size=(out, 1))
    weight[:, random.integers(size)] *= 6
    return torch.from_numpy(weight)


def inputs_of(seed, rows, size):
    """Correlated, a few of them large, one always 0."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, size)) @ (np.eye(size) + 0.4 * random.normal(size=(size, size)) / np.sqrt(size))
    x *= np.exp(random.normal(size=size))
    x[:, size // 2] = 0
    return torch.from_numpy(x)


def loss_of(weight, quantized, x):
    """‖(W − Q)·X‖² by its definition."""
    return float((((weight.numpy() - quantized.dense().astype(np.float64)) @ x.numpy().T) ** 2).sum())


def slow_gptq(weight, hessian, form: LinearFormat, scales, zeros, columns, keep=None):
    """Optimal brain quantization one column at a time, as in the paper's equations 2 and 3: the inverse of the Hessian of the columns not
    yet rounded is made anew for every column. Where ``keep`` is False, 0 is all that a weight may be rounded to."""
    weight, size = weight.copy(), weight.shape[1]
    group, limit = form.group or size, NUMBERS[form.number][1]
    codes, left = np.full(weight.shape, np.nan), list(columns)
    for q in columns:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        at = left.index(q)
        scale, column = scales[:, q // group], weight[:, q]
        if zeros is None:
            code = np.clip(np.rint(column / scale), -limit - (form.bits < 8), limit)
            meant = code * scale
        else:
            least = -(2 ** (form.bits - 1))
            code = np.clip(np.rint(column / scale) + zeros[:, q // group], least, -least - 1)
            meant = (code - zeros[:, q // group]) * scale
        if keep is not None:
            code, meant = np.where(keep[:, q], code, 0), np.where(keep[:, q], meant, 0)
        codes[:, q] = code
        weight[:, left] -= np.outer((column - meant) / inverse[at, at], inverse[at])
        left.remove(q)
    return codes
