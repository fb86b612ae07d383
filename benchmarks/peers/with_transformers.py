"""transformers in bfloat16: AutoModelForCausalLM.generate."""

from pathlib import Path

import worker
from environment import TORCH

NAME = "transformers"
FORMATS = ("bf16",)
INSTALL = (("install", TORCH), ("install", TORCH, "transformers>=5.23,<6"))


def load(checkpoint: Path, work: Path, form: str, threads: int, context: int, batch: int) -> tuple[str, worker.Generate]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> list[int]:
        ids = torch.tensor(prompts)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        if made.shape[1] != ids.shape[1] + new:
            raise RuntimeError(f"{made.shape[1] - ids.shape[1]} tokens were made, not {new}")
        return made[:, ids.shape[1]].tolist()

    return transformers.__version__, generate


if __name__ == "__main__":
    worker.main(FORMATS, load)
