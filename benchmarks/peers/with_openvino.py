"""OpenVINO GenAI: LLMPipeline over a model that optimum-intel exports and compresses."""

import subprocess
import sys
from pathlib import Path

import worker
from environment import TORCH

NAME = "openvino"
FORMATS = ("int8", "int4")
INSTALL = (
    ("install", TORCH),
    ("install", TORCH, "openvino-genai", "openvino-tokenizers", "optimum-intel[nncf]"),
    ("uninstall", "--yes", "torchvision"),  # comes along, is not needed, and refuses a torch that it was not built with
)

COMPRESSION = {"int8": ("--weight-format", "int8"), "int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0")}


def load(checkpoint: Path, work: Path, form: str, threads: int, context: int, batch: int) -> tuple[str, worker.Generate]:
    import numpy as np
    import openvino
    import openvino_genai

    made = work / form
    if not (made / "openvino_model.xml").is_file():
        command = ["export", "openvino", "--task", "text-generation-with-past", "--model", str(checkpoint), *COMPRESSION[form], str(made)]
        subprocess.run([str(Path(sys.executable).with_name("optimum-cli")), *command], check=True)
    pipeline = openvino_genai.LLMPipeline(str(made), "CPU", INFERENCE_NUM_THREADS=threads, ENABLE_MMAP=False)

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        settings = openvino_genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)
        made = pipeline.generate(inputs, settings).tokens
        if any(len(each) != new for each in made):
            raise RuntimeError("a sequence ended early")
        return [each[0] for each in made]

    return openvino_genai.__version__, generate


if __name__ == "__main__":
    worker.main(FORMATS, load)
