"""Which kernel computes an op on a device: candidates in order, each of which says why it cannot, or leaves it to the next."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.experts import expert_linear
from hasten.backends.cuda.kernels.linear import linear
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat

Site = TypeVar("Site")


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate(Generic[Site]):
    """``refuses`` says in words why the kernel is not for a site, or None; ``launch`` is its plain function."""

    name: str
    refuses: Callable[[Site], str | None]
    launch: Callable[..., None]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice(Generic[Site]):
    """The first candidate that does not refuse, and what those before it said, by name."""

    candidate: Candidate[Site]
    refused: tuple[tuple[str, str], ...]


def choose(candidates: Sequence[Candidate[Site]], site: Site) -> Choice[Site]:
    """Raises UnsupportedError, with every reason, where all refuse."""
    refused: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.refuses(site)
        if reason is None:
            return Choice(candidate, tuple(refused))
        refused.append((candidate.name, reason))
    raise UnsupportedError("; ".join(f"{name}: {reason}" for name, reason in refused) or "there is no candidate")


@dataclasses.dataclass(frozen=True, slots=True)
class LinearSite:
    """A product of ``rows`` rows (a bucket) with a weight [out, size] in ``form``, fed "bf16", "f32" or "int8", into ``dtype``.

    ``invariant``: a row's bits must not depend on the other rows. ``capability`` is the device's, (9, 0) for an H200."""

    form: LinearFormat
    fed: str
    rows: int
    out: int
    size: int
    dtype: torch.dtype
    invariant: bool
    capability: tuple[int, int]


def _cublas_refuses(site: LinearSite) -> str | None:
    if site.form.number not in {"bf16", "f16", "f32"}:
        return f"reads dense weights alone, not {site.form}"
    if site.invariant:
        return "cuts K as the number of rows suggests, so a row's bits would depend on its batch"
    if site.fed != site.form.number or site.dtype != {"bf16": torch.bfloat16, "f32": torch.float32}.get(site.fed):
        return "rows, weight and result have one dtype"
    return None


def _triton_refuses(site: LinearSite) -> str | None:
    if site.fed not in site.form.activations:
        return f"weights in {site.form} are multiplied with {' or '.join(site.form.activations)}, not {site.fed}"
    if site.capability < (8, 0):
        return f"needs a device of compute capability 8.0 for bfloat16; this one has {site.capability[0]}.{site.capability[1]}"
    if site.form.number == "fp8" and site.capability < (8, 9):
        return f"needs a device of compute capability 8.9 for fp8; this one has {site.capability[0]}.{site.capability[1]}"
    if site.fed == "int8" and site.size * 127 * 127 >= 2**31:
        return f"a sum of {site.size} products of bytes may not fit in 32 bits"
    if site.fed == "int8" and site.form.zero_points and site.form.bits > 4:
        return f"bytes with zero points are not multiplied with bytes: {site.form}; feed it bfloat16"
    return None


def cublas(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """y[T, out] = x[T, size] · weightᵀ + bias through torch, all of one dtype; whatever order of sums its library takes."""
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


LINEAR: tuple[Candidate[LinearSite], ...] = (
    Candidate("cublas", _cublas_refuses, cublas),
    Candidate("triton", _triton_refuses, linear),
)

EXPERT_LINEAR: tuple[Candidate[LinearSite], ...] = (Candidate("triton", _triton_refuses, expert_linear),)
"""``rows`` of a site are T · A choices here."""
