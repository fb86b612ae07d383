"""Training: one small trainer for everything that is learned, from models made from nothing to cut ones that heal."""

from hasten.train.batches import Batches, Example, examples_of
from hasten.train.curve import draw_curve, picture_curve, read_curve
from hasten.train.distances import AttentionMaps, Distance, Hidden, Measure, Relations, Soft
from hasten.train.joint import Beside, Joined, joined, of_member, projected
from hasten.train.objectives import Divergence, Labels, Loss, Objective
from hasten.train.parameters import Masked, Parameters, Plain, linear_weights, untrained
from hasten.train.rounded import Grid, Rounded
from hasten.train.schedule import Schedule
from hasten.train.teachers import Teacher
from hasten.train.together import Follows, Learner, SoftLabels, Together
from hasten.train.trainer import Minutes, Settings, Steps, Trained, Work, precision_here, train

__all__ = [
    "AttentionMaps",
    "Batches",
    "Beside",
    "Distance",
    "Divergence",
    "Example",
    "Follows",
    "Grid",
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
    "Rounded",
    "Schedule",
    "Settings",
    "Soft",
    "SoftLabels",
    "Steps",
    "Teacher",
    "Together",
    "Trained",
    "Work",
    "draw_curve",
    "examples_of",
    "joined",
    "of_member",
    "linear_weights",
    "picture_curve",
    "precision_here",
    "projected",
    "read_curve",
    "train",
    "untrained",
]
