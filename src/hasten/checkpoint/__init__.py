"""Checkpoint: models on disk, in the Hub's cache, in the package, or made at random."""

from hasten.checkpoint.export import exported
from hasten.checkpoint.load import load, load_directory
from hasten.checkpoint.locate import BUNDLED, bundled_directory
from hasten.checkpoint.random import SHAPES, random_model
from hasten.checkpoint.save import layout_of, save, unread_elsewhere

__all__ = [
    "BUNDLED",
    "SHAPES",
    "bundled_directory",
    "exported",
    "layout_of",
    "load",
    "load_directory",
    "random_model",
    "save",
    "unread_elsewhere",
]
