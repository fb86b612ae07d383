"""Engine: requests in, tokens out."""

from hasten.engine.draw import TokenLogprob
from hasten.engine.grammar import Grammar
from hasten.engine.llm import LLM, Completion
from hasten.engine.request import Chunk
from hasten.engine.sampling import BeamSearch, SamplingParams

__all__ = ["LLM", "BeamSearch", "Chunk", "Completion", "Grammar", "SamplingParams", "TokenLogprob"]
