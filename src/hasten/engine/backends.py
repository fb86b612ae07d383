"""Which backend plays a model, and its sessions."""

import importlib.util
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.base import hardware
from hasten.base.errors import MissingExtraError, UnsupportedError
from hasten.engine.session import Session
from hasten.formats.quantized import QuantizedWeight
from hasten.model import Model, find_backend, load_backend
from hasten.program import Batch, Formats

AUTO = "auto"
"""The backend that is best for a model on this machine."""
DEVICE = "cuda"
"""The one that 'auto' takes where it can."""


class Scorer(Protocol):
    """What scoring needs of a backend: logits of whole sequences, nothing carried on."""

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [R, vocab] of the batch's rows."""
        ...


def choose_backend(model: Model, backend: str = AUTO, formats: Formats | None = None, unfit: str = "") -> tuple[str, str]:
    """The backend to take, and what to tell the user about it ('' where there is nothing to tell).

    'auto' takes the GPU where there is one that can play it, unless ``unfit`` says why it is not to; else the native backend where that
    has every kernel, else the reference.
    Torch is imported only where a GPU's driver shows. Raises UnsupportedError for an unknown name, or for a weight format that would need
    the native backend where it cannot run."""
    if backend != AUTO:
        find_backend(backend)  # a wrong name is told at once, not with the first prompt
        return backend, ""
    notices = []
    if hardware.may_have_gpu() and all(importlib.util.find_spec(name) for name in ("torch", "triton")):
        device = load_backend(DEVICE)
        if not (why := unfit or device.hindrance(model, formats)):
            return DEVICE, f"{model.name} runs on {device.described()}"
        notices = [f"{model.name} does not run on the GPU: {why}"]
    missing = load_backend("cpu").refusals(model)
    if not missing:
        if fed_otherwise(model) and (formats is None or formats.activations is None):
            notices.append(f"{model.name} is meant to be fed fp8, for which there are no native kernels: it is fed bf16, which rounds less")
        return "cpu", "; ".join(notices)
    if formats is not None and formats.weights is not None:
        raise UnsupportedError(
            f"weights {formats.weights} pay on the native backend, which has no kernel for {', '.join(missing)} of {model.name}; "
            "--backend reference plays what they mean, no faster"
        )
    notices.append(f"{model.name} runs on the reference backend: no native kernel for {', '.join(missing)}")
    return "reference", "; ".join(notices)


def choose_judge(model: Model) -> str:
    """The backend that tells how good ``model`` is as it is stored: the one that plays it here, unless that would feed its weights in
    another format than they are meant to be fed in; then the reference."""
    backend = choose_backend(model)[0]
    return "reference" if backend == "cpu" and fed_otherwise(model) else backend


def fed_otherwise(model: Model) -> bool:
    """Whether the native backend has no kernels for what weights are stored to be multiplied with."""
    return any(isinstance(weight, QuantizedWeight) and weight.activations == "fp8" for weight in model.weights.values())


def open_session(model: Model, backend: str, context: int, formats: Formats | None = None, cache_bytes: int | None = None) -> Session:
    """A session of the named backend, whose pages take ``cache_bytes``, as many as the backend thinks fit unless given. Raises
    MissingExtraError where the backend's library is not installed."""
    session: Session = find_loaded(backend, model).session(model, context, formats, cache_bytes)
    return session


def open_scorer(model: Model, backend: str, context: int, formats: Formats | None = None) -> Scorer:
    """The same, for scoring."""
    scorer: Scorer = find_loaded(backend, model).session(model, context, formats, None)
    return scorer


def find_loaded(backend: str, model: Model | None = None) -> Any:
    """The backend of that name, which ``model`` is to run on. Raises MissingExtraError where its library is not installed."""
    try:
        return load_backend(backend)
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "triton"}:
            raise
        who = f"backend {backend!r}" if model is None else f"{model.name}: backend {backend!r}"
        raise MissingExtraError(who, "cuda" if backend == "cuda" else "torch") from None
