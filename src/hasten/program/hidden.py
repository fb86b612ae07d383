"""Hidden states: a Program without its head."""

from hasten.program.program import Program


def hidden_states(program: Program) -> Program:
    """The Program that returns, in place of logits, the rows asked for after the last norm [R, width]: what the head would read.

    It keeps the same state, so both may go on from each other's. Of a Program that is not fused."""
    return program.with_outputs(["norm" if "norm" in program.values else "rows"])
