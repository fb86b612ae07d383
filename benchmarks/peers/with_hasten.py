"""hasten as its users run it: LLM.generate on the native backend."""

from pathlib import Path

import worker

FORMATS = ("bf16", "int8", "int4")


def load(checkpoint: Path, work: Path, form: str, threads: int, context: int, batch: int) -> tuple[str, worker.Generate]:
    from hasten import LLM, SamplingParams, __version__
    from hasten.base import hardware
    from hasten.program import Formats

    if threads != hardware.detect().cpu.cores:
        raise SystemExit(f"hasten takes all {hardware.detect().cpu.cores} cores granted; give the comparison a CPU affinity of {threads}")
    llm = LLM(checkpoint, backend="cpu", formats=Formats(form), context=context, max_sequences=batch)
    llm.generate([[3]], SamplingParams(max_tokens=1))  # weights are packed for the first prompt

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        made = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
        if any(len(each.token_ids) != new for each in made):
            raise RuntimeError("a sequence ended early")
        return [each.token_ids[0] for each in made]

    return __version__, generate


if __name__ == "__main__":
    worker.main(FORMATS, load)
