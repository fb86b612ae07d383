"""The reference backend: every op in plain torch, on any device, differentiable. The oracle for all others, and the trainer's engine."""

from hasten.backends.reference.backend import ReferenceBackend, ReferenceSession
from hasten.backends.reference.play import play, weights_of
from hasten.backends.reference.state import State

__all__ = ["ReferenceBackend", "ReferenceSession", "State", "play", "weights_of"]
