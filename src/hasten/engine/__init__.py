"""Engine: requests in, tokens out."""

from hasten.engine.llm import LLM, Completion
from hasten.engine.request import Chunk
from hasten.engine.sampling import SamplingParams

__all__ = ["LLM", "Chunk", "Completion", "SamplingParams"]
