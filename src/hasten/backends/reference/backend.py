"""The reference backend as an engine sees it: sessions that take batches and return logits as numpy."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.backends.reference.kernels import TORCH_DTYPES
from hasten.backends.reference.play import play, weights_of
from hasten.backends.reference.state import State
from hasten.base.errors import ConfigError
from hasten.model import Model
from hasten.program import Batch, Formats, Precision, Program, linear_formats, lower


class ReferenceBackend:
    """Plays Programs on ``device``, in float32 with the Spec's residual dtype unless ``precision`` says otherwise."""

    name = "reference"

    def __init__(self, device: str = "cpu", precision: Precision | None = None) -> None:
        self.device, self.precision = device, precision

    def session(self, model: Model, context: int | None = None, formats: Formats | None = None) -> "ReferenceSession":
        """Weights made ready once, for steps of sequences of up to ``context`` tokens. Other ``formats`` are computed as what they mean."""
        formats, precision = formats or Formats(), self.precision or Precision(residual=model.spec.residual)
        linear = linear_formats(lower(model.spec, context=context), formats)
        program = lower(model.spec, context=context, precision=precision, formats=linear, cache=formats.cache)
        return ReferenceSession(program, weights_of(program, model.weights, self.device, TORCH_DTYPES[precision.compute]))

    def logits(self, model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 [T, vocab] of one sequence."""
        batch = Batch.of([token_ids])
        if len(batch.tokens) > model.spec.context:
            raise ConfigError(f"{len(batch.tokens)} tokens are more than the model's context of {model.spec.context}; shorten the input")
        return self.session(model, len(batch.tokens)).score(batch)


class ReferenceSession:
    """One program with its weights. Stateless scoring, or steps that carry a State from the caller and back."""

    def __init__(self, program: Program, weights: dict[str, Tensor]) -> None:
        self.program, self.weights = program, weights

    def start(self, sequences: int) -> State:
        """The state of sequences that have seen nothing."""
        return State(sequences)

    @torch.inference_mode()
    def step(self, batch: Batch, state: State) -> tuple[NDArray[np.float32], State]:
        """Logits float32 [R, vocab] of the rows asked for, and the state afterwards."""
        outputs, after = play(self.program, self.weights, batch, state)
        return outputs["logits"].float().numpy(force=True), after

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits float32 [R, vocab] of whole sequences; nothing is carried on."""
        outputs, _ = play(self.program, self.weights, batch)
        return outputs["logits"].float().numpy(force=True)
