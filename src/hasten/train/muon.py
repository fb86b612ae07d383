"""Muon: momentum whose matrices are made orthogonal before they step. torch's own computes in bfloat16, which takes a processor without
bfloat16 units a hundred times as long; this one computes in what the masters are in."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Jordan 2024 (kellerjordan.github.io/posts/muon), with Nesterov momentum, updates as large as AdamW's (Liu et al. 2025,
    arXiv:2502.16982) and decoupled weight decay, for masters [..., out, in], matrix by matrix."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """By the gradients that there are. A closure is not called."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                kept = self.state[master]
                if "momentum_buffer" not in kept:
                    kept["momentum_buffer"] = torch.zeros_like(master)
                buffer = kept["momentum_buffer"]
                buffer.lerp_(master.grad, 1 - group["momentum"])
                update = orthogonal(master.grad.lerp(buffer, group["momentum"]))
                master.mul_(1 - group["lr"] * group["weight_decay"])
                master.add_(update, alpha=-group["lr"] * 0.2 * max(master.shape[-2:]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix [..., out, in] with singular values of 1: within some tenths, which is as near as steps need (a quintic
    Newton–Schulz iteration that grows small values fast)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    made: Tensor = x.mT if tall else x
    return made
