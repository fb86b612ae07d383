"""Training: one small trainer for everything that is learned, from models made from nothing to cut ones that heal."""

from hasten.train.batches import Batches, Example, examples_of
from hasten.train.curve import draw_curve, picture_curve, read_curve
from hasten.train.objectives import Divergence, Labels, Loss, Objective, SoftLabels
from hasten.train.parameters import Masked, Parameters, Plain, untrained
from hasten.train.rounded import Grid, Rounded
from hasten.train.schedule import Schedule
from hasten.train.trainer import Minutes, Settings, Steps, Trained, Work, precision_here, train

__all__ = [
    "Batches",
    "Divergence",
    "Example",
    "Grid",
    "Labels",
    "Loss",
    "Masked",
    "Minutes",
    "Objective",
    "Parameters",
    "Plain",
    "Rounded",
    "Schedule",
    "Settings",
    "SoftLabels",
    "Steps",
    "Trained",
    "Work",
    "draw_curve",
    "examples_of",
    "picture_curve",
    "precision_here",
    "read_curve",
    "train",
    "untrained",
]
