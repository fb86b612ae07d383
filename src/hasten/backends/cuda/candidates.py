"""Which kernel computes an op on a device: candidates in order, each of which says why it cannot, or leaves it to the next."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hasten.backends.cuda.kernels.experts import expert_linear
from hasten.backends.cuda.kernels.linear import linear
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.base.errors import UnsupportedError
from hasten.formats.linear import LinearFormat

Site = TypeVar("Site")
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate(Generic[Site]):
    """``refuses`` says in words why the kernel is not for a site, or None; ``launch`` is its plain function, of x, weight, y, and by name
    scale and bias; of Triton's kernels more besides."""

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
    """A product of ``rows`` rows (a bucket) with a weight [out, size] in ``form``, fed "bf16", "f32", "int8" or "fp8", into ``dtype``;
    ``heads`` weights and row by row of them their own inputs, ``biased`` or not.

    ``invariant``: a row's bits must not depend on the other rows. ``capability`` is the device's, (9, 0) for an H200. ``measured`` is the
    kernel that what was measured there names for this product: of libraries', only that is known to be invariant. ``two_of_four``: of any
    four inputs side by side, at most two have a weight that is not 0."""

    form: LinearFormat
    fed: str
    rows: int
    out: int
    size: int
    dtype: torch.dtype
    invariant: bool
    capability: tuple[int, int]
    measured: str = "triton"
    two_of_four: bool = False
    heads: int = 1
    biased: bool = False


CUBLAS, SCALED_MM, SEMI_STRUCTURED = "cublas", "scaled_mm", "semi_structured"


def _unmeasured(site: LinearSite, name: str, why: str) -> str | None:
    """Why a library's product is not to be relied on, unless it was found invariant, and faster, where the site is."""
    if site.invariant and site.measured != name:
        return f"{why}, so a row's bits would depend on its batch; nothing measured on this device says otherwise"
    return None


def _cublas_refuses(site: LinearSite) -> str | None:
    if site.form.number not in {"bf16", "f16", "f32"}:
        return f"reads dense weights alone, not {site.form}"
    if site.heads > 1:
        return f"has one weight, not {site.heads}"
    if refusal := _unmeasured(site, CUBLAS, "may cut K as the number of rows suggests"):
        return refusal
    if site.fed != site.form.number or site.dtype != _DTYPES.get(site.fed):
        return "rows, weight and result have one dtype"
    return _bias_refusal(site)


def _bias_refusal(site: LinearSite) -> str | None:
    if site.biased and site.dtype != torch.float32:
        return "would add the bias to what is rounded already"
    return None


def _scaled_mm_refuses(site: LinearSite) -> str | None:
    if site.form.number != "fp8" or site.form.group:
        return f"reads fp8 weights with one scale a channel, not {site.form}"
    if site.fed != "fp8":
        return f"multiplies rows of fp8, and these are {site.fed}, which fp8 does not hold"
    if site.capability < (8, 9):
        return f"needs a device of compute capability 8.9; this one has {site.capability[0]}.{site.capability[1]}"
    if site.out % 16 or site.size % 16:
        return f"takes sizes in multiples of 16, not {site.out} × {site.size}"
    if site.heads > 1 or site.dtype != torch.bfloat16:
        return "gives one weight's results in bfloat16"
    return _unmeasured(site, SCALED_MM, "is cut by its library") or _bias_refusal(site)


def _semi_structured_refuses(site: LinearSite) -> str | None:
    if not site.form.sparse or site.form.number != "bf16":
        return f"reads bf16-sparse weights, not {site.form}"
    if not site.two_of_four:
        return "more than two of four inputs side by side have a weight"
    if site.capability < (8, 0):
        return f"needs a device of compute capability 8.0; this one has {site.capability[0]}.{site.capability[1]}"
    if site.out % 64 or site.size % 64:
        return f"takes sizes in multiples of 64, not {site.out} × {site.size}"
    if site.heads > 1 or (site.fed, site.dtype) != ("bf16", torch.bfloat16):
        return "rows, one weight and result are bfloat16"
    return _unmeasured(site, SEMI_STRUCTURED, "is cut by its library") or _bias_refusal(site)


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


def cublas(x: Tensor, weight: PackedWeight, y: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    """y[T, out] = x[T, size] · weightᵀ + bias through torch, all of one dtype; whatever order of sums its library takes."""
    codes = weight.codes[:, : weight.size].t()
    if bias is None:
        torch.mm(x, codes, out=y)
    else:
        torch.addmm(bias, x, codes, out=y)


def scaled_mm(x: Tensor, weight: PackedWeight, y: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    """y[T, out] bfloat16 = (x[T, size] · codesᵀ) · scale[T, 1] · scales[1, out] of float8_e4m3fn, summed by the library. Raises ValueError
    for rows without scales, or a bias, which would be added in bfloat16."""
    if scale is None or weight.scales is None or bias is not None:
        raise ValueError("rows and weights of fp8 come with their scales, and without a bias")
    codes = weight.codes[:, : weight.size].t()
    y.copy_(torch._scaled_mm(x, codes, scale, weight.scales, out_dtype=y.dtype))  # which takes no rows that lie apart


def semi_structured(x: Tensor, weight: PackedWeight, y: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    """y[T, out] bfloat16 = x[T, size] · weightᵀ for a weight that was ``compressed``. Raises ValueError for a bias, or another weight."""
    if weight.layout != "two_of_four" or bias is not None:
        raise ValueError("a weight that was compressed, and no bias, is what is multiplied two of four")
    y.copy_(torch.nn.functional.linear(x, weight.codes))  # torch gives it no place to write to


LINEAR: tuple[Candidate[LinearSite], ...] = (
    Candidate(CUBLAS, _cublas_refuses, cublas),
    Candidate(SCALED_MM, _scaled_mm_refuses, scaled_mm),
    Candidate(SEMI_STRUCTURED, _semi_structured_refuses, semi_structured),
    Candidate("triton", _triton_refuses, linear),
)
"""Those of libraries come first, for they are chosen only where they were measured to win."""

EXPERT_LINEAR: tuple[Candidate[LinearSite], ...] = (Candidate("triton", _triton_refuses, expert_linear),)
"""``rows`` of a site are T · A choices here."""
