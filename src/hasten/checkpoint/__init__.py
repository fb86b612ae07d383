"""Checkpoint: models on disk, in the Hub's cache, in the package, or made at random."""

from hasten.checkpoint.load import load, load_directory
from hasten.checkpoint.locate import BUNDLED, bundled_directory
from hasten.checkpoint.random import SHAPES, random_model
from hasten.checkpoint.save import save, unread_elsewhere

__all__ = ["BUNDLED", "SHAPES", "bundled_directory", "load", "load_directory", "random_model", "save", "unread_elsewhere"]
