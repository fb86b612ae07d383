"""llm-compressor as its documentation uses it: `oneshot` with a recipe. Run by the interpreter of its own environment; see compare.py.

It computes in float32, which a CPU is faster at than bfloat16, and which costs its results nothing.

python with_llm_compressor.py CHECKPOINT OUT WINDOWS.json --method gptq|awq --group 64"""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path

NAME = "llm_compressor"
METHODS = ("gptq", "awq")


def install(torch: str) -> tuple[tuple[str, ...], ...]:
    """Its requirements but two that neither method uses, a tool for NVIDIA's driver and another quantizer."""
    needed = (
        "compressed-tensors==0.19.0", "transformers>=5.15,<=5.17.0", "accelerate>=1.15", "datasets>=4.8.4", "loguru", "pillow", "requests",
    )  # fmt: skip
    return (("install", torch), ("install", torch, *needed), ("install", "--no-deps", "llmcompressor==0.14.*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("windows", type=Path)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--group", type=int, required=True)
    given = parser.parse_args()

    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, index: None  # for copies to a GPU; without one torch refuses, and AWQ ends there
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": given.group}
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**scheme)] if given.method == "gptq" else [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme)]
    model = transformers.AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)
    windows = json.loads(given.windows.read_text())
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in windows]
    began = time.perf_counter()
    oneshot(model=model, dataset=torch.utils.data.DataLoader(batches, batch_size=None), recipe=recipe, pipeline="sequential")
    seconds = time.perf_counter() - began
    model.get_input_embeddings().to(torch.bfloat16)  # as it came, so that bytes compare
    model.save_pretrained(given.out, save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(given.checkpoint).save_pretrained(given.out)
    print(json.dumps({"version": metadata.version("llmcompressor"), "seconds": seconds, "windows": len(windows)}), file=sys.stdout)


if __name__ == "__main__":
    main()
