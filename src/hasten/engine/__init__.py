"""Engine: requests in, tokens out.

`LLM` is all of it for one program. Who has requests come and go, as a server does, prepares each and steps the engine:

    prepared = llm.prepare("def main(", SamplingParams(max_tokens=64, n=2), tenant="acme", priority=1)  # UserError: refused
    engine = llm.engine(prepared.context)
    numbers = prepared.submit(engine)  # NeverFitsError: it could not run even alone
    answers[prepared.index] = prepared.answer()
    while engine.busy:
        for chunk in engine.step():
            answer = answers[chunk.index]
            send(chunk.index, answer.take(chunk))  # what can be told by now: of ``best_of``, nothing before all are there
            if answer.done:
                completions = answers.pop(chunk.index).completions()

Any of it may be done at any time between steps, in the thread that steps; a client that goes away is ``engine.abort(number)`` for each of
its ``numbers``, after which no chunk of it comes. Several LLMs in one process divide its memory by ``share_memory([a, b], bytes)``.
"""

from hasten.engine.answer import Answer, Completion
from hasten.engine.draw import TokenLogprob
from hasten.engine.grammar import Grammar
from hasten.engine.llm import LLM
from hasten.engine.plan import NeverFitsError
from hasten.engine.prepare import Prepared
from hasten.engine.request import Chunk
from hasten.engine.sampling import BeamSearch, SamplingParams
from hasten.engine.sharing import share_memory

__all__ = [
    "LLM", "Answer", "BeamSearch", "Chunk", "Completion", "Grammar", "NeverFitsError", "Prepared", "SamplingParams", "TokenLogprob",
    "share_memory",
]  # fmt: skip
