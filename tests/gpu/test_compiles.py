"""What the compiler makes of the kernels for an H200, on any machine: all of them compile, and products take one instruction's family."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = 227 * 1024  # bytes that a program may have on compute capability 9.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton has no compiler for NVIDIA devices")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiling"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles_and_fits(made):
    assert {each["kernel"] for each in made} == {
        "_linear", "_experts", "_route", "_count", "_place", "_combine", "_norm", "_gate", "_fixed", "_mapped", "_take",
        "_attend", "_add_parts", "_rotary_tables", "_rotate_append", "_move_pages", "_causal_conv", "_selective_scan", "_dual_scan",
        "_gated_delta_scan", "_linear_scan", "_keep",
        "_rank", "_search", "_draw", "_choose", "_feed",
    }  # fmt: skip
    assert all(each["shared"] <= SHARED for each in made)


def test_few_rows_and_many_go_through_the_same_instruction(made):
    """wgmma m64nNk…: only N, the rows of a tile, differs; an element's sum over k is the instruction's own."""
    by_format = {}
    for each in made:
        if each["kernel"] == "_linear":
            label, rows = each["case"].split(", ")
            by_format.setdefault(label, {})[rows] = {part for pair in each["products"] for part in pair if part}
    assert len(by_format) == 5
    for few, many in (found.values() for found in by_format.values()):
        (one,), (other,) = few, many
        assert one.startswith("m64n16k"), one
        assert other == one.replace("n16", "n128")


@pytest.mark.parametrize("kernel", ["_dual_scan", "_linear_scan"])
def test_decoded_rows_and_prompts_of_a_recurrence_go_through_the_same_instructions(kernel, made):
    """All on tensor cores; but for N, the rows of a tile, in which a row's own sums do not show."""
    by_rows = {}
    for each in made:
        if each["kernel"] == kernel:
            found = {re.sub(r"^m64n\d+", "m64n", part) for pair in each["products"] for part in pair if part}
            by_rows.setdefault(each["case"], set()).update(found)
    assert by_rows["decoding"] == by_rows["prompts"]
    assert by_rows["decoding"]


def test_nibbles_are_taken_apart_two_by_two(made):
    assert {each["case"].split(",")[0]: bool(each["nibbles"]) for each in made if each["kernel"] == "_linear"} == {
        "bf16": False, "int8 × int8": False, "int4 × bf16": True, "fp8 × fp8": False, "fp8 × fp8 of 4000": False,
    }  # fmt: skip


def test_fp8_is_multiplied_as_it_is_and_summed_in_float32(made):
    """Hopper adds products of fp8 to sums of few bits, so those of every step go on to float32: as many more additions as a tile has sums
    in a lane, wherever steps are summed. Rows are rounded by the device's own conversion, and only where they become fp8."""
    by_case = {each["case"]: each for each in made if each["kernel"] == "_linear"}
    fp8, bf16 = (by_case[f"{label}, 4096 rows"] for label in ("fp8 × fp8", "bf16"))
    assert {part for pair in fp8["products"] for part in pair if part} == {"m64n128k32.f32.e4m3.e4m3"}
    assert fp8["added"] - bf16["added"] == 2 * 128 * 128 // (32 * fp8["warps"])
    rounding = [each for each in made if each["narrowed"] and each["case"].startswith("rows")]
    assert [(each["case"], each["kernel"]) for each in rounding] == [("rows to fp8", kernel) for kernel in ("_norm", "_gate", "_gate")]


def test_attention_goes_through_wgmma(made):
    """Scores and sums alike: no product falls back to an instruction of older devices."""
    products = [each["products"] for each in made if each["kernel"] == "_attend"]
    assert len(products) == 2
    assert all(found and all(group and not older for group, older in found) for found in products), products


def test_rows_are_read_in_wide_loads(made):
    """Of 16 bytes. (A page of linear attention is one column wider than its values, which leaves 4.)"""
    wide = {
        "_linear", "_experts", "_norm", "_gate", "_mapped", "_take", "_attend", "_rotate_append", "_causal_conv", "_selective_scan",
        "_dual_scan", "_gated_delta_scan",
    }  # fmt: skip
    assert all(each["wide"] for each in made if each["kernel"] in wide)


def test_draws_round_every_product(made):
    """A product fused with its sum, or an approximate division, has other bits than the engine's."""
    assert {each["kernel"] for each in made if each["case"] == "draws"} == {"_rank", "_search", "_draw", "_choose", "_feed"}
    assert not any(each["fused"] for each in made if each["case"] == "draws")
