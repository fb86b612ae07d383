"""Measure: how good a model is on text, how fast on this machine."""

from hasten.measure.evaluate import Evaluation, Score, Windows, cut_windows, score_windows
from hasten.measure.text import Corpus, held_out, read_corpus

__all__ = ["Corpus", "Evaluation", "Score", "Windows", "cut_windows", "held_out", "read_corpus", "score_windows"]
