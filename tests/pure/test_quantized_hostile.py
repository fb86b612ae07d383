"""Configs and tensors of quantized checkpoints with pieces replaced at random: what loads has numbers, and all else is one line."""

import copy
import random

import numpy as np
import pytest

from hasten.base.errors import UserError
from hasten.checkpoint.quantized import read_quantized
from hasten.formats.gguf import GgufFile
from tests.pure import test_gguf as gguf
from tests.pure import test_gptq_and_awq as gptq_and_awq
from tests.pure.test_compressed_tensors import group, stored, tensors, whole

JUNK = [
    None,
    0,
    -1,
    3,
    1.5,
    float("inf"),
    [],
    {},
    "x",
    True,
    False,
    2**70,
    -(10**30),
    [[]],
    {"a": {}},
    [1, 2],
    [None],
    ["re:.*"],
    "int",
    "group",
]
KEYS = ["sparsity_config", "strategy", "actorder", "x", "ignore", "dynamic", "group_size", "block_structure", "format", "version"]
KINDS = [np.int32, np.float32, np.int8, np.uint8, np.int64, np.float16, np.bool_]

CASES = {
    "compressed-tensors": (
        whole(
            {"g": group(symmetric=False, strategy="group", group_size=32, inputs={"num_bits": 8, "dynamic": True})},
            ignore=["x"], kv_cache_scheme=None, sparsity_config={}, transform_config={},
        ),
        {**stored("m", 4, 6, 64, 2, True)[0], "m.weight_g_idx": (np.arange(64) // 32).astype(np.int32)},
    ),
    "sparse": (
        whole({"g": group(["re:m$"], layout="bitmask-sparse", num_bits=8, strategy="group", group_size=32)}),
        {
            "m.weight_bitmask": np.full((6, 8), 0b01010101, np.uint8), "m.weight_compressed": np.arange(-96, 96, dtype=np.int8),
            "m.weight_scale": np.ones((6, 2), np.float32), "m.weight_shape": np.array([6, 64]),
        },
    ),
    "gptq": (
        gptq_and_awq.gptq_config(4, 32, 2, sym=False, dynamic={"m": {"bits": 4}}, meta={}, desc_act=False),
        {f"m.{name}": array for name, array in gptq_and_awq.GOOD.items()},
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        {f"m.{name}": array for name, array in gptq_and_awq.AWQ.items()},
    ),
}  # fmt: skip


def places(value, before=()):
    """Paths to all parts of a JSON value."""
    yield before
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*before, key))


def other_config(config, dice):
    changed = copy.deepcopy(config)
    *path, last = dice.choice(list(places(changed))[1:])
    inside = changed
    for key in path:
        inside = inside[key]
    if isinstance(inside, dict) and dice.random() < 0.2:
        last = dice.choice(KEYS)
    inside[last] = copy.deepcopy(dice.choice(JUNK))
    return changed


def other_tensors(arrays, dice):
    changed = dict(arrays)
    name = dice.choice(list(changed))
    array = changed.pop(name)
    with np.errstate(all="ignore"):
        match dice.randrange(5):
            case 1:
                changed[name] = array.astype(dice.choice(KINDS))
            case 2:
                changed[name] = np.zeros([dice.choice([0, 1, 2, 3, 8, 64]) for _ in range(dice.randint(0, 3))], array.dtype)
            case 3:
                changed[name] = array.reshape(-1)
            case 4:
                changed[name] = array.copy()
                changed[name].reshape(-1)[dice.randrange(array.size)] = np.array(dice.choice([0, -1, 100, 127])).astype(array.dtype)
    return changed


@pytest.mark.parametrize("method", CASES)
def test_a_checkpoint_with_pieces_replaced(method):
    config, arrays = CASES[method]
    dice, loaded, refused = random.Random(method), 0, []
    for _ in range(500):
        given = other_config(config, dice) if dice.random() < 0.6 else config
        held = other_tensors(arrays, dice) if dice.random() < 0.6 else arrays
        try:
            for weight in read_quantized(given, tensors(**held)).values():
                assert weight.load().shape == weight.shape
                assert weight.nbytes >= 0
            loaded += 1
        except UserError as error:
            refused.append(str(error))
    assert loaded > 50
    assert len(refused) > 50
    assert all("\n" not in line and len(line) < 600 for line in refused)


def test_a_gguf_header_with_bytes_replaced(tmp_path):
    dice, path, opened, refused = random.Random(0), tmp_path / "m.gguf", 0, []
    for _ in range(1000):
        raw = bytearray(gguf.GOOD)
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(len(raw) - 160)] = dice.choice([0, 1, 2, 7, 8, 9, 32, 127, 128, 255])
        path.write_bytes(raw)
        try:
            GgufFile.open(path)
            opened += 1
        except UserError as error:
            refused.append(str(error))
    assert opened > 20
    assert len(refused) > 500
    assert all("\n" not in line and len(line) < 600 for line in refused)
