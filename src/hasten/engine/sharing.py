"""Sharing memory: several LLMs in one process, planned together."""

from collections.abc import Sequence

from hasten.base.errors import ConfigError
from hasten.engine.llm import LLM
from hasten.engine.memory import MemoryPlan, plan_memory


def share_memory(llms: Sequence[LLM], memory: int) -> tuple[MemoryPlan, ...]:
    """Plan weights, caches and arenas of ``llms`` in ``memory`` bytes together, before any of them has answered; a plan for each.

    Their caches hold as many sequences of full length each. Raises UserError, with the number that would do, where ``memory`` is not
    enough, and ConfigError for an LLM that has its cache already, or a ``memory`` or ``cache_bytes`` of its own."""
    for llm in llms:
        if llm.bounded:
            raise ConfigError(f"{llm.model.name} has a bound of its own; leave out memory and cache_bytes where memory is shared")
    loads = [llm.loads() for llm in llms]
    plans = iter(plan_memory([load for its in loads for load in its], memory=memory, free=0))
    for llm, its in zip(llms, loads):
        llm.keep_to([next(plans) for _ in its])
    return tuple(llm.memory_plan() for llm in llms)
