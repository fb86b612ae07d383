"""The reference backend as an engine sees it: sessions that take batches and return logits as numpy."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.reference.pages import Pages
from hasten.backends.reference.play import play, weights_of
from hasten.backends.reference.step import TORCH_DTYPES
from hasten.base import hardware
from hasten.base.errors import ConfigError
from hasten.formats.cache import cache_format
from hasten.model import Model
from hasten.program import (
    Batch,
    Formats,
    HostLogits,
    Move,
    PageLists,
    Precision,
    Program,
    hidden_states,
    linear_formats,
    lower,
    page_counts,
)

PAGE = 16  # tokens
ELEMENT_BYTES = {"int8": 1, "fp8": 1, "bfloat16": 2, "float16": 2, "float64": 8}
"""Of values; others have 4."""


class ReferenceBackend:
    """Plays Programs on ``device``, in float32 with the Spec's residual dtype unless ``precision`` says otherwise."""

    name = "reference"
    page = PAGE

    def __init__(self, device: str = "cpu", precision: Precision | None = None) -> None:
        self.device, self.precision = device, precision

    def program(self, model: Model, context: int | None = None, formats: Formats | None = None) -> Program:
        """What a session would play."""
        formats, precision = (formats or Formats()).meant_for(model.cache), self.precision or Precision(residual=model.spec.residual)
        linear = linear_formats(lower(model.spec, context=context), formats, model.weights)
        cache = None if formats.cache is None else cache_format(formats.cache)
        return lower(model.spec, context=context, precision=precision, formats=linear, cache=cache)

    def weight_bytes(self, program: Program) -> int:
        """Bytes that the weights of ``program`` take here: all in the compute dtype, whatever the format says."""
        compute = TORCH_DTYPES[(self.precision or Precision()).compute]
        return sum(math.prod(shape) for shape in program.params.values()) * compute.itemsize

    def arena_bytes(self, program: Program, tokens: int) -> int:
        """Bytes of the values of a step of ``tokens`` tokens that live at the same time, at their most, its logits left out; what torch
        takes within an op comes on top."""
        logits = program.values["logits"].features if "logits" in program.values else None
        sizes = {
            name: 0 if (value.rows, value.features) == ("R", logits) else tokens * ELEMENT_BYTES.get(value.dtype, 4) * math.prod(
                program.context if size < 0 else size for size in value.features
            )
            for name, value in program.values.items()
        }  # fmt: skip
        last = {name: index for index, op in enumerate(program.ops) for name in (*op.inputs, *op.outputs)}
        live, most = 0, 0
        for index, op in enumerate(program.ops):
            live += sum(sizes[name] for name in op.outputs)
            most = max(most, live)
            live -= sum(sizes[name] for name in {*op.inputs, *op.outputs} if last[name] == index)
        return most

    def drawing_bytes(self, program: Program, sequences: int) -> int:
        """None besides rows of logits: the engine draws."""
        return 0

    def free_bytes(self) -> int:
        """Bytes that weights, caches and arenas may take together."""
        if torch.device(self.device).type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return hardware.free_bytes()

    def session(
        self, model: Model, context: int | None = None, formats: Formats | None = None, cache_bytes: int | None = None
    ) -> "ReferenceSession":
        """Weights made ready once, for steps of sequences of up to ``context`` tokens. Other ``formats`` are computed as what they mean;
        keys and values are kept in the compute dtype unless they say otherwise.

        ``cache_bytes`` is how much its pages may take together, a quarter of free memory unless given."""
        program = self.program(model, context, formats)
        memory = self.free_bytes() // 4 if cache_bytes is None else cache_bytes
        compute = TORCH_DTYPES[(self.precision or Precision()).compute]
        return ReferenceSession(program, weights_of(program, model.weights, self.device, compute), memory)

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


class ReferenceSession:
    """One Program with its weights, and pages of ``page`` tokens for what sequences keep, of which ``pages`` says how many there are by
    state group. Which of them holds what is the caller's business."""

    page = PAGE
    threads = None
    """Torch has its own."""
    drawer = None
    """The engine draws."""

    def __init__(self, program: Program, weights: dict[str, Tensor], cache_bytes: int) -> None:
        self.program, self.weights = program, weights
        self.pages = page_counts(program, PAGE, cache_bytes)
        self._kept = Pages(program, PAGE)

    def settle(self) -> None:
        """Nothing is ever under way."""

    @torch.inference_mode()
    def carry_out(self, moves: Sequence[Move]) -> None:
        """Copy pages, swap them out and in, in this order."""
        self._kept.carry_out(moves)

    @torch.inference_mode()
    def run(self, batch: Batch, pages: Sequence[PageLists]) -> HostLogits:
        """Logits float32 [R, vocab] of the rows asked for; what the batch's sequences keep goes to their ``pages``."""
        return HostLogits(self._play(self.program, batch, pages))

    @torch.inference_mode()
    def hidden(self, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        """Hidden states float32 [R, width] after the last norm, of the rows asked for; kept is the same as by ``run``."""
        return self._play(hidden_states(self.program), batch, pages)

    def _play(self, program: Program, batch: Batch, pages: Sequence[PageLists]) -> NDArray[np.float32]:
        outputs, after = play(program, self.weights, batch, self._kept.read(batch, pages))
        self._kept.write(after, batch, pages)
        return outputs[program.outputs[0]].float().numpy(force=True)

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        outputs, _ = play(self.program, self.weights, batch)
        return outputs["logits"].float().numpy(force=True)
