"""The codebook transform: numbers of a matrix are clustered, and each becomes its place among sixteen (Deep Compression, Han et al. 2015,
arXiv:1510.00149); clusters are weighed by what is read (SqueezeLLM, Kim et al. 2023, arXiv:2306.07629), errors fed back (GPTQ)."""

import dataclasses
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.base.errors import ConfigError
from hasten.compress.blocks import Moments
from hasten.compress.data import Text
from hasten.compress.gptq import damped, in_turn
from hasten.compress.rounding import Rounder, Uniform, check_layers, round_blocks, same_form
from hasten.compress.walk import Run
from hasten.formats.codebook import Codebook, Floats, fitted, places
from hasten.formats.linear import WITH_CODEBOOK, ClusteredLinear, LinearFormat, QuantizedLinear
from hasten.model import Model


class Cluster(Uniform, frozen=True, kw_only=True):
    """Codebooks and scales are chosen for the least squared error of ``weights``, or of outputs as far as each input's size tells, in so
    many ``rounds`` of one after the other; ``feedback`` makes each input's error good by those behind, as GPTQ does, with its ``damp``."""

    weights: str = "lut4-g64"
    fit: Literal["weights", "outputs"] = "outputs"
    rounds: int = 4
    feedback: bool = True
    damp: float = 0.01

    @property
    def needs_text(self) -> bool:
        """Whether it looks at activations."""
        return self.feedback or self.fit == "outputs"


@dataclasses.dataclass(frozen=True, slots=True)
class Book:
    """The numbers that a weight may be rounded to: those of ``codebook`` times ``scales`` [out, groups], of ``group`` inputs each."""

    scales: Floats
    codebook: Codebook
    group: int

    @classmethod
    def fit(cls, weight: Floats, form: LinearFormat, importance: NDArray[np.floating] | None = None, rounds: int = 1) -> Self:
        """The best that ``rounds`` come to for ``weight`` [out, in], each input's errors weighed by ``importance`` [in]. The first is
        LinearFormat.quantize's choice of scales."""
        group, each = form.group or weight.shape[1], np.ones(weight.shape[1]) if importance is None else importance
        scales = _largest(weight, group) / np.float32(127)
        scales[scales == 0] = 1
        best, least = None, np.inf
        for _ in range(rounds):
            book = cls(scales, fitted(weight, scales, group, each), group)
            made = book.nearest(weight)
            lost = float((np.square(weight - made.dense(), dtype=np.float64) * each).sum())
            if best is not None and not lost < least:
                break
            best, least = book, lost
            scales = book._solved(weight, made.q, each)
        if best is None:
            raise ConfigError(f"rounds is {rounds}; accepted: at least 1")
        return best

    def nearest(self, weight: Floats) -> ClusteredLinear:
        """``weight`` [out, in] rounded to nearest."""
        return ClusteredLinear(places(weight, self.scales, self.group, self.codebook), self.scales, None, self.group, self.codebook)

    def codes(self, columns: Tensor, inputs: Tensor) -> Tensor:
        """Places of what is nearest to ``columns`` [out, n], the weights of ``inputs`` [n]."""
        numbers = torch.from_numpy(self.codebook).to(columns.dtype)
        return torch.bucketize(columns / self._of(inputs, columns), (numbers[:-1] + numbers[1:]) / 2, right=True).to(columns.dtype)

    def dense(self, codes: Tensor, inputs: Tensor) -> Tensor:
        """What places [out, n] of ``inputs`` [n] stand for."""
        return torch.from_numpy(self.codebook).to(codes.dtype)[codes.long()] * self._of(inputs, codes)

    def quantized(self, codes: Tensor) -> ClusteredLinear:
        """All places [out, in] with what they go with."""
        return ClusteredLinear(codes.numpy().astype(np.int8), self.scales, None, self.group, self.codebook)

    def _solved(self, weight: Floats, q: Codebook, importance: NDArray[np.floating]) -> Floats:
        """The scales with which the numbers at ``q`` come nearest to ``weight``; where these are all 0, or turned, those there are."""
        numbers, begins = self.codebook[q].astype(np.float64), np.arange(0, weight.shape[1], self.group)
        wanted = np.add.reduceat(weight * numbers * importance, begins, axis=1)
        energy = np.add.reduceat(np.square(numbers) * importance, begins, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (wanted / energy).astype(np.float32)
        solved: Floats = np.where((found > 0) & np.isfinite(found), found, self.scales)
        return solved

    def _of(self, inputs: Tensor, like: Tensor) -> Tensor:
        return torch.from_numpy(self.scales).to(like.dtype)[:, torch.div(inputs, self.group, rounding_mode="floor")]


def check_codebook(model: Model, settings: Cluster) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    form = settings.form
    if not form.has_codebook:
        raise ConfigError(f"weights {form} have no codebook; accepted are {', '.join(WITH_CODEBOOK)} and their variants, as lut4-g64")
    if settings.activations not in form.activations:
        raise ConfigError(f"activations {settings.activations} do not go with weights in {form}; accepted: {', '.join(form.activations)}")
    check_layers(model, settings)
    same_form(model, settings)
    if not 1 <= settings.rounds <= 100:
        raise ConfigError(f"rounds is {settings.rounds}; accepted are 1 to 100")
    if not 0 < settings.damp < 1:
        raise ConfigError(f"damp is {settings.damp}; accepted is a share between 0 and 1, as 0.01")


def codebook(model: Model, settings: Cluster, text: Text | None, run: Run) -> Model:
    """Every weight that ``settings`` mean, each matrix with a codebook of its own. ``text`` is used where they look at activations."""
    text = text if settings.needs_text else None
    return round_blocks(model, "codebook", settings, same_form(model, settings), text, run, _rounder(settings))


def _rounder(settings: Cluster) -> Rounder:
    def one(weight: Tensor, moments: Moments | None, form: LinearFormat) -> QuantizedLinear:
        if moments is None and settings.needs_text:
            raise ConfigError("codebook looks at activations, so it needs text to calibrate on; or take fit: weights, feedback: false")
        square = None if moments is None else moments.square
        importance = damped(square, settings.damp).diagonal().numpy() if square is not None and settings.fit == "outputs" else None
        book = Book.fit(weight.numpy(), form, importance, settings.rounds)
        if square is None or not settings.feedback:
            return book.nearest(weight.numpy())
        return in_turn(weight, square, book, torch.argsort(square.diagonal(), descending=True, stable=True), damp=settings.damp)

    return one


def _largest(weight: Floats, group: int) -> Floats:
    """Of each group's sizes, [out, groups]."""
    made: Floats = np.maximum.reduceat(np.abs(weight), np.arange(0, weight.shape[1], group), axis=1)
    return made
