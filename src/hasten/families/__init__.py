"""Families: readers of foreign checkpoints."""

from hasten.families.config import ConfigReader
from hasten.families.family import Config, Family
from hasten.families.registry import all_families, find_family, model_types

__all__ = ["Config", "ConfigReader", "Family", "all_families", "find_family", "model_types"]
