"""A family that somebody else wrote: one file and an entry point, and the tests and commands know it. A broken one is one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import ENVIRONMENT, assert_refused, run
from tests.families.oracles import make_checkpoint

ROOT = Path(__file__).parents[2]

OLMO2 = '''
"""OLMo 2: no norm before the branches but one after each, and one over the whole rows of queries and keys."""

from hasten.families import Config, Family
from hasten.families.config import ConfigReader
from hasten.families.llama import ACTIVATIONS, attention, ends, gated_mlp
from hasten.families.rope import read_rotary
from hasten.formats.tensor_map import TensorMap, rename
from hasten.spec import Attention, Block, BranchNorm, Embedding, GatedMLP, Head, RMSNorm, Spec


def read(reader: ConfigReader) -> Spec:
    width, heads, context = reader.size("hidden_size"), reader.size("num_attention_heads"), reader.size("max_position_embeddings", 2048)
    head_dim, bias = width // heads, reader.flag("attention_bias", False)
    norm = RMSNorm(eps=reader.number("rms_norm_eps", 1e-5))
    block = Block(
        mixer=Attention(
            heads=heads, kv_heads=reader.size("num_key_value_heads", heads), head_dim=head_dim, value_dim=head_dim, scale=head_dim**-0.5,
            position=read_rotary(reader, head_dim=head_dim, context=context), bias=bias, out_bias=bias, q_norm=norm, k_norm=norm,
            norm_span="row",
        ),
        feed_forward=GatedMLP(hidden=reader.size("intermediate_size"), activation=reader.choice("hidden_act", ACTIVATIONS, "silu")),
        wiring=BranchNorm(mixer_post=norm, feed_forward_post=norm),
    )
    return Spec(
        vocab=reader.size("vocab_size"), width=width, context=context, embedding=Embedding(),
        blocks=(block,) * reader.parts("num_hidden_layers"), norm=norm, head=Head(tied=reader.flag("tie_word_embeddings", False)),
    )


def tensors(spec: Spec, config: Config) -> TensorMap:
    mappings = [*ends(spec)]
    for index in range(len(spec.blocks)):
        theirs, ours = f"model.layers.{index}", f"blocks.{index}"
        mappings += [*attention(spec, index), *gated_mlp(spec, index)]
        mappings.append(rename(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mixer_post_norm.weight"))
        mappings.append(rename(f"{theirs}.post_feedforward_layernorm.weight", f"{ours}.feed_forward_post_norm.weight"))
    return tuple(mappings)


TINY = {
    "model_type": "olmo2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}

FAMILY = Family(
    name="olmo2", model_types=("olmo2",), read=read, tensors=tensors, base_prefix="model.",
    examples=(TINY, {**TINY, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
)
'''
CONFIG = {
    "model_type": "olmo2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def install(directory, module, text, entry, name="olmo2"):
    """What `pip install` leaves behind: the module, and a .dist-info that names its entry point. Returns an environment that sees it."""
    directory.mkdir(exist_ok=True)
    (directory / f"{module}.py").write_text(text)
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hasten.families]\n{name} = {entry}\n")
    return {"PYTHONPATH": str(directory)}


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    return install(tmp_path_factory.mktemp("site"), "hasten_olmo2", OLMO2, "hasten_olmo2:FAMILY")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("olmo2") / "model"
    oracle = make_checkpoint(CONFIG, directory)
    return directory, oracle


def test_the_generic_family_tests_cover_it(olmo2):
    command = [sys.executable, "-m", "pytest", "tests/families/test_families.py", "-k", "olmo2", "-p", "no:cacheprovider", "-vv"]
    done = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **olmo2}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    for test in ("test_logits[", "test_logits_chunked_at_random[", "test_written_back[", "test_gradients_reach_every_weight["):
        for example in (0, 1):
            assert any(f"{test}olmo2-{example}]" in line for line in passed), test
    assert "FAILED" not in done.stdout
    assert "SKIPPED" not in done.stdout


def test_the_commands_know_it(olmo2, checkpoint):
    directory, oracle = checkpoint
    done = run("inspect", directory, "--json", env=olmo2)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["family"] == "olmo2"
    assert facts["blocks"][0]["count"] == 3
    assert facts["blocks"][0]["wiring"].startswith("BranchNorm")
    ids = [5, 9, 60, 1]
    done = run("generate", directory, "--token-ids", ",".join(map(str, ids)), "-n", "8", "--ignore-eos", "--json", env=olmo2)
    assert done.code == 0, done.err
    expected = list(ids)
    for _ in range(8):
        expected.append(int(oracle(expected)[-1].argmax()))
    assert json.loads(done.out)["token_ids"] == expected[len(ids) :]


def test_without_the_package_it_is_unknown(checkpoint):
    assert_refused(run("inspect", checkpoint[0]), "'olmo2'", "llama")


BROKEN = {
    "import fails": ("import no_such_module_anywhere\n", "broken:FAMILY", ["ModuleNotFoundError", "no_such_module_anywhere"]),
    "syntax error": ("def (\n", "broken:FAMILY", ["SyntaxError"]),
    "raises": ("raise RuntimeError('two\\nlines')\n", "broken:FAMILY", ["RuntimeError", "two\\nlines"]),
    "no such name": ("", "broken:FAMILY", ["AttributeError", "FAMILY"]),
    "no such module": ("", "elsewhere:FAMILY", ["ModuleNotFoundError", "elsewhere"]),
    "no family": ("FAMILY = ['olmo2']\n", "broken:FAMILY", ["['olmo2']", "hasten.families.Family"]),
    "another family": ("from hasten.families import llama\nFAMILY = llama.FAMILY\n", "broken:FAMILY", ["family of llama"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_one_line(case, tmp_path):
    text, entry, fragments = BROKEN[case]
    environment = install(tmp_path / "site", "broken", text, entry)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    assert_refused(run("inspect", tmp_path / "model", env=environment), "'olmo2'", "hasten.families", *fragments)


def test_a_broken_package_hurts_no_other_family(tmp_path):
    environment = install(tmp_path / "site", "broken", "raise SystemError\n", "broken:FAMILY")
    assert run("inspect", "code-8m", env=environment).code == 0


def test_a_built_in_family_cannot_be_replaced(tmp_path):
    module = f"open({str(tmp_path / 'canary')!r}, 'w').close()\n{OLMO2}"
    environment = install(tmp_path / "site", "impostor", module, "impostor:FAMILY", name="llama")
    done = run("inspect", "code-8m", "--json", env=environment)
    assert done.code == 0, done.err
    assert json.loads(done.out)["family"] == "llama"
    assert not (tmp_path / "canary").exists()
