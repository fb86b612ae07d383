"""Bytes of rounded weights on disk, against counts made by hand."""

import re

import pytest

from hasten.checkpoint import load, save
from hasten.checkpoint.quantized.writing import stored_bytes
from hasten.compress.recipe import carry_out, recipe_of
from hasten.compress.walk import Run
from hasten.formats.linear import LinearFormat
from hasten.formats.safetensors import SafetensorsFile

# outputs × inputs, and how many of each, as the shapes' authors say
CODE_8M = {(256, 256): 2, (128, 256): 2, (768, 256): 2, (256, 768): 1}
TINYLLAMA = {(2048, 2048): 2, (256, 2048): 2, (5632, 2048): 2, (2048, 5632): 1}
BLOCKS = {"code-8m": (CODE_8M, 8), "random:tinyllama-1.1b": (TINYLLAMA, 22)}


def by_hand(shapes, bits, group):
    """Numbers of so many bits, and a scale of four bytes for each group of inputs."""
    return sum(count * (out * size * bits // 8 + 4 * out * (size // (group or size))) for (out, size), count in shapes.items())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("form", "bits", "group", "most"), [("int8", 8, 0, 0.51), ("int4", 4, 128, 0.27)])
def test_bytes_over_bf16(name, form, bits, group, most):
    shapes, blocks = BLOCKS[name]
    model = load(name)
    linear = [weight.shape for key, weight in model.weights.items() if key.startswith("blocks.") and len(weight.shape) == 2]
    expected = blocks * by_hand(shapes, bits, group)
    assert len(linear) == blocks * sum(shapes.values())
    assert sum(stored_bytes(shape, LinearFormat.parse(form)) for shape in linear) == expected
    assert expected <= most * 2 * blocks * sum(out * size * count for (out, size), count in shapes.items())


@pytest.mark.parametrize(
    ("settings", "bits", "group", "most"),
    [
        ({"weights": "int8"}, 8, 0, 0.51),
        ({"weights": "int8", "activations": "int8"}, 8, 0, 0.51),
        ({"weights": "int4"}, 4, 128, 0.27),
    ],
)
def test_bytes_of_the_files(settings, bits, group, most, tmp_path):
    save(carry_out(load("code-8m"), recipe_of([{"rtn": settings}]), None, Run(tmp_path / "work", 2)), tmp_path / "out")
    file = SafetensorsFile.open(tmp_path / "out" / "model.safetensors")
    sizes = {name: file.read(name).nbytes for name in file.entries if re.search(r"layers\.\d+\.(self_attn|mlp)\.", name)}
    shapes = sum(size for name, size in sizes.items() if name.endswith("weight_shape"))
    assert sum(sizes.values()) - shapes == 8 * by_hand(CODE_8M, bits, group)
    plain = 2 * 8 * sum(out * size * count for (out, size), count in CODE_8M.items())
    assert sum(sizes.values()) <= most * plain
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < load("code-8m").weights.nbytes - plain + most * plain + 60_000
