"""How much the model's output suffers by what rounding does to each weight, measured before anything is rounded.

To second order, KL(model ‖ model with W + E) = ½ · vec(E)ᵀ · F · vec(E), F the Fisher information of W over the text: the mean of g·gᵀ,
g the gradient of the log-likelihood of tokens drawn from the model's own distribution (Amari 1998; not of the text's tokens, which would
give the empirical Fisher). So ½ · (g · E)² is, window by window, an unbiased estimate of the divergence, whatever the errors within the
weight have to do with each other, and one backward pass serves every way to round every weight.

Errors of several weights add up (Malinovskii et al. 2024, arXiv:2411.17525), so that what is best chosen for each is an integer
programme (Yao et al. 2020, arXiv:2011.10680).

Forwards and backwards the model is gone through block by block, one in memory at a time; what lies between blocks is kept on disk."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from hasten.backends.reference import play
from hasten.compress.blocks import Live, Moments, Played, chunks_of, keep, opened, pieces, tail, weights_for
from hasten.compress.data import Text
from hasten.compress.sites import Layers, sites_of
from hasten.compress.threads import in_order, one_torch_thread
from hasten.compress.walk import Run, claim, cleared, fingerprint
from hasten.model import Model
from hasten.program import Batch, Program

Errors = Callable[[str, Tensor, Sequence[Moments]], Sequence[Tensor]]
"""What is added to a weight, given its name and the moments of what it reads (one entry, or one per expert), in each of the ways that it
may be rounded."""


def divergences(
    model: Model, settings: msgspec.Struct, weights: Collection[str], errors: Errors, text: Text, run: Run
) -> dict[str, list[float]]:
    """For each of ``weights``, and each of its ``errors``, KL(model ‖ model with that error alone) over ``text``, in nats a token.

    Kept in ``run.work`` like a walk: a later call with the same model, ``settings`` and text goes on behind the last block that was
    finished, and comes to the same numbers."""
    key = fingerprint(model, settings, text)
    run.work.mkdir(parents=True, exist_ok=True)
    claim(run.work, key)
    sweep = _Sweep(model, (*pieces(model.spec, text.longest), tail(model.spec, text.longest)), text, run)
    with one_torch_thread(), torch.no_grad():
        sweep.forward()
        sweep.backward(set(weights), errors)
    return sweep.costs()


@dataclasses.dataclass(frozen=True, slots=True)
class _Sweep:
    """Forwards through all ``parts`` (embedding, blocks, head), then back. ``live-N`` is what part N is fed, ``grad-N`` its gradient, and
    ``cost-N`` what was found of its weights."""

    model: Model
    parts: tuple[Program, ...]
    text: Text
    run: Run

    @property
    def last(self) -> int:
        """The number of the head; blocks are 1 to one less."""
        return len(self.parts) - 1

    def path(self, name: str, number: int) -> Path:
        return self.run.work / f"{name}-{number:04d}"

    def costs(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for number in range(1, self.last):
            found |= json.loads(self.path("cost", number).read_text("utf-8"))
        return found

    def forward(self) -> None:
        """All of ``live``, and the gradient that the head begins with; nothing where that was done before."""
        if self.path("grad", self.last).is_dir() or any(self.path("cost", number).is_file() for number in range(1, self.last)):
            return
        live, chunks = Live({}), chunks_of(self.text.windows)
        for number, piece in enumerate(self.parts[:-1]):
            self.run.report("activations of all blocks", number, self.last)
            directory = self.path("live", number + 1)
            if directory.is_dir():
                live = opened(directory, piece)
            else:
                played = Played(piece, live, chunks, self.run.threads)
                live = played.carry_on(weights_for(piece, self.model.weights), cleared(directory))
        self.keep(self.last, self.head_gradients(live))

    def backward(self, wanted: Collection[str], errors: Errors) -> None:
        """Every block that has no ``cost`` yet, the last first."""
        for number in reversed(range(1, self.last)):
            if self.path("cost", number).is_file():
                continue
            self.run.report(f"sensitivity of block {number - 1}", self.last - 1 - number, self.last - 1)
            costs = self.block(number, wanted, errors)
            partial = self.path("cost", number).with_suffix(".partial")
            partial.write_text(json.dumps(costs), "utf-8")
            partial.rename(self.path("cost", number))
            for name in ("live", "grad"):
                shutil.rmtree(self.path(name, number + 1), ignore_errors=True)
        for name in ("live", "grad"):
            shutil.rmtree(self.path(name, 1), ignore_errors=True)

    def head_gradients(self, live: Live) -> Iterator[dict[str, Tensor]]:
        """Of −log p of tokens drawn from the model's own distribution, one for every row, window by window."""
        head = self.parts[-1]
        weights = weights_for(head, self.model.weights)

        def one(index: int) -> dict[str, Tensor]:
            with torch.enable_grad():
                given = self.given(live, index)
                logits = play(head, weights, Batch.of([self.text.windows[index]]), given={name: given[name] for name in head.inputs})[0][
                    "logits"
                ].float()
                draw = torch.Generator().manual_seed(index)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
                loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
                return _by_name(given, torch.autograd.grad(loss, list(given.values()), allow_unused=True))

        return in_order(one, range(len(self.text.windows)), self.run.threads)

    def block(self, number: int, wanted: Collection[str], errors: Errors) -> dict[str, list[float]]:
        """What is found of the weights of one block; its gradient is kept for the block before it."""
        piece, before, text = self.parts[number], self.parts[number - 1], self.text
        weights = weights_for(piece, self.model.weights)
        live, above = opened(self.path("live", number), before), opened(self.path("grad", number + 1), piece)
        sites = [site for site in sites_of(piece, Layers()) if site.weight in wanted]
        moments = Played(piece, live, chunks_of(text.windows), self.run.threads).moments(weights, sites)
        made = in_order(lambda site: errors(site.weight, weights[site.weight], moments[site]), sites, self.run.threads)
        moved = {site.weight: each for site, each in zip(sites, made)}
        sums = {name: np.zeros(len(each)) for name, each in moved.items()}

        def one(index: int) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
            with torch.enable_grad():
                given = self.given(live, index)
                leaves = {name: weights[name].detach().requires_grad_() for name in moved}
                batch = Batch.of([text.windows[index]], rows="none")
                outputs = play(piece, {**weights, **leaves}, batch, given={name: given[name] for name in piece.inputs})[0]
                names = [name for name in piece.outputs if outputs[name].requires_grad]
                inputs = [*given.values(), *leaves.values()]
                into = [self.rows(above, name, index) for name in names]
                found = torch.autograd.grad([outputs[name] for name in names], inputs, into, allow_unused=True)
            slopes = _by_name(leaves, found[len(given) :])
            products = {name: [float(torch.vdot(slopes[name].reshape(-1), error.reshape(-1))) for error in moved[name]] for name in moved}
            return _by_name(given, found[: len(given)]), products

        def gradients() -> Iterator[dict[str, Tensor]]:
            for gradient, products in in_order(one, range(len(text.windows)), self.run.threads):
                for name, each in products.items():
                    sums[name] += np.square(each)
                yield gradient

        self.keep(number, gradients())
        return {name: (each / 2 / text.tokens).tolist() for name, each in sums.items()}

    def given(self, live: Live, index: int) -> dict[str, Tensor]:
        """What window ``index`` feeds a part, to be differentiated by."""
        return {name: self.rows(live, name, index).requires_grad_() for name in live.rows}

    def rows(self, live: Live, name: str, index: int) -> Tensor:
        """Those of window ``index``."""
        begin = sum(map(len, self.text.windows[:index]))
        return torch.from_numpy(np.array(live.rows[name][begin : begin + len(self.text.windows[index])]))

    def keep(self, number: int, gradients: Iterator[dict[str, Tensor]]) -> None:
        """As ``grad`` of that number."""
        keep(gradients, self.parts[number - 1], self.text.tokens, cleared(self.path("grad", number)))


def _by_name(of: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by the name of what they are of; what has no effect has zeros."""
    return {name: torch.zeros_like(each) if found is None else found for (name, each), found in zip(of.items(), gradients, strict=True)}
