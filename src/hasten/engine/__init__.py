"""Engine: requests in, tokens out."""

from hasten.engine.llm import LLM, Chunk, Completion
from hasten.engine.sampling import SamplingParams

__all__ = ["LLM", "Chunk", "Completion", "SamplingParams"]
