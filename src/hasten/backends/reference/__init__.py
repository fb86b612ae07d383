"""The reference backend: every op in plain torch, on any device, differentiable. The oracle for all others, and the trainer's engine."""

import hasten.backends.reference.before_torch  # noqa: F401  (for what importing it does)
from hasten.backends.reference.backend import ReferenceBackend, ReferenceSession
from hasten.backends.reference.play import play, weights_of
from hasten.backends.reference.state import State
from hasten.backends.reference.step import Adapter

__all__ = ["Adapter", "ReferenceBackend", "ReferenceSession", "State", "play", "weights_of"]
