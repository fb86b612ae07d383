"""Training: one small trainer for everything that is learned, from models made from nothing to cut ones that heal."""

from hasten.train.batches import Batches, Example, examples_of
from hasten.train.curve import draw_curve, picture_curve, read_curve
from hasten.train.distances import AttentionMaps, Distance, Hidden, Measure, Relations, Soft
from hasten.train.joint import Joined, joined, of_member, projected
from hasten.train.objectives import Divergence, Labels, Loss, Objective
from hasten.train.parameters import Masked, Parameters, Plain, linear_weights, untrained
from hasten.train.schedule import Schedule
from hasten.train.together import Follows, Learner, Together, taps_of
from hasten.train.trainer import Minutes, Settings, Steps, Trained, Work, train

__all__ = [
    "AttentionMaps",
    "Batches",
    "Distance",
    "Divergence",
    "Example",
    "Follows",
    "Hidden",
    "Joined",
    "Labels",
    "Learner",
    "Loss",
    "Masked",
    "Measure",
    "Minutes",
    "Objective",
    "Parameters",
    "Plain",
    "Relations",
    "Schedule",
    "Settings",
    "Soft",
    "Steps",
    "Together",
    "Trained",
    "Work",
    "draw_curve",
    "examples_of",
    "joined",
    "linear_weights",
    "of_member",
    "picture_curve",
    "projected",
    "read_curve",
    "taps_of",
    "train",
    "untrained",
]
