"""Rounding that is learned block by block: codes and scales of a block together, for what the block as a whole gives."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hasten.backends.reference import play
from hasten.base.errors import ConfigError
from hasten.compress.data import Text
from hasten.compress.rounding import Gptq, Uniform, check_rounding, gptq_rounder, round_blocks, same_form
from hasten.compress.walk import Block, Run
from hasten.formats.linear import LinearFormat, QuantizedLinear
from hasten.model import Model
from hasten.train import Grid


class BlockQat(Uniform, frozen=True, kw_only=True):
    """The first phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062): from where GPTQ leaves a block, its codes and scales learn over
    ``epochs`` of the text, by Adam at ``rate`` (in steps of the codes) and ``scale_rate``, to give what the block gave unrounded."""

    epochs: int = 2
    rate: float = 0.02
    scale_rate: float = 0.001


def check_block_qat(model: Model, settings: BlockQat) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    check_rounding(model, settings)
    if pruned := [name for name, form in same_form(model, settings).items() if form.sparse]:
        raise ConfigError(f"{pruned[0]} was pruned, and block_qat would fill its zeros; round it by rtn or gptq")
    if not settings.form.is_integer:
        raise ConfigError(f"block_qat learns integers, not {settings.form}; accepted are int8, int4, int3, int2 and their variants")
    if not 1 <= settings.epochs <= 100 or not 0 < settings.rate < math.inf or not 0 < settings.scale_rate < math.inf:
        raise ConfigError(f"epochs is {settings.epochs}, rate {settings.rate}, scale_rate {settings.scale_rate}; all are more than 0")


def block_qat(model: Model, settings: BlockQat, text: Text, run: Run) -> Model:
    """``model`` with every block learned on ``text``, each fed what the learned ones before it give."""
    forms = same_form(model, settings)
    start = gptq_rounder(Gptq(weights=settings.weights, activations=settings.activations, clip="outputs"))

    def refine(block: Block, made: Mapping[str, QuantizedLinear]) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
        return learn_block(block, made, forms, settings)

    return round_blocks(model, "block_qat", settings, forms, text, run, start, plain=True, refine=refine)


def learn_block(
    block: Block, made: Mapping[str, QuantizedLinear], forms: Mapping[str, LinearFormat], settings: BlockQat
) -> tuple[dict[str, QuantizedLinear], dict[str, float]]:
    """The codes and scales of ``made``, learned; and how much of what the block gives was error, by energy, before and after.

    Where that is no less, they are returned as they came."""
    if block.plain is None:
        raise ConfigError("block_qat looks at activations, so it needs text to calibrate on")
    names = block.piece.outputs
    wanted = [{name: values[name].clone() for name in names} for values in block.plain.outputs(block.weights, names)]
    energy = sum(float(value.double().square().sum()) for values in wanted for value in values.values())
    grids = {name: Grid.of(name, its, forms[name], block.weights[name].numpy()) for name, its in made.items()}
    before = _error(block, _played(block, grids), wanted) / energy
    optimizer = torch.optim.Adam(
        [
            {"params": [master for grid in grids.values() for master in grid.codes.masters.values()], "lr": settings.rate * _step(grids)},
            {"params": [grid.share for grid in grids.values()], "lr": settings.scale_rate},
        ],
        betas=(0.9, 0.95),
    )
    text = block.text()
    steps, step = settings.epochs * len(text.chunks), 0
    for _ in range(settings.epochs):
        for (batch, begin, end), values in zip(text.chunks, wanted):
            for group, rate in zip(optimizer.param_groups, (settings.rate * _step(grids), settings.scale_rate)):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                given = {name: torch.from_numpy(text.live.rows[name][begin:end].copy()) for name in block.piece.inputs}
                found, _ = play(block.piece, _played(block, grids), batch, given=given)
                loss = sum(((found[name] - values[name]).square().sum() for name in names), torch.zeros(()))
                optimizer.zero_grad()
                (loss / energy * len(wanted)).backward()
            optimizer.step()
            step += 1
    after = _error(block, _played(block, grids), wanted) / energy
    if not after < before:
        return dict(made), {"before": before, "after": before}
    return {name: grid.made() for name, grid in grids.items()}, {"before": before, "after": after}


def _played(block: Block, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    return {**block.weights, **{name: grid.weight() for name, grid in grids.items()}}


@torch.no_grad()
def _error(block: Block, weights: Mapping[str, Tensor], wanted: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for found, values in zip(block.text().outputs(weights, block.piece.outputs), wanted):
        total += sum(float((found[name] - values[name]).double().square().sum()) for name in values)
    return total


def _step(grids: Mapping[str, Grid]) -> float:
    """A step of the codes as it is on the whole."""
    return sum(float(grid.began.mean()) for grid in grids.values()) / len(grids)
