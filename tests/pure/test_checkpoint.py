"""Loading and saving: what was saved is what loads, here and elsewhere, lazily; and a save happens whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hasten import load, save
from hasten.base.errors import CheckpointError, ConfigError, TokenizerError, UserError
from hasten.checkpoint import bundled_directory, load_directory
from hasten.families import find_family
from hasten.formats.safetensors import SafetensorsFile, write
from hasten.formats.weights import DTYPES, Weight, Weights
from hasten.model import Model, Provenance, Source
from hasten.program import lower
from tests.cli import ENVIRONMENT, ROOT

CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
TIED = CONFIG | {"tie_word_embeddings": True}


def tiny(config=CONFIG, dtypes=("float32",), seed=0):
    """A random llama; its weights take the dtypes in turn."""
    spec = find_family("llama").spec(config)
    rng = np.random.default_rng(seed)
    weights = {}
    for index, (name, shape) in enumerate(lower(spec).params.items()):
        array = (rng.standard_normal(shape) * 0.1).astype(DTYPES[dtypes[index % len(dtypes)]])
        weights[name] = Weight(shape, array.dtype, lambda array=array: array)
    return Model(name="tiny", spec=spec, weights=Weights(weights), source=Source("llama", config))


def assert_same(a, b):
    assert a.spec == b.spec
    assert list(a.weights) == list(b.weights)
    for name in a.weights:
        assert a.weights[name].dtype == b.weights[name].dtype, name
        assert np.array_equal(a.weights.array(name), b.weights.array(name)), name


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def rewrite(directory, change):
    """Apply ``change`` to the tensors of a saved checkpoint."""
    file = SafetensorsFile.open(directory / "model.safetensors")
    tensors = change({name: np.array(file.read(name)) for name in file.entries})
    write(directory / "model.safetensors", {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.__getitem__)


# --- there and back


@pytest.mark.parametrize("own_layout", [False, True])
@pytest.mark.parametrize("dtypes", [[name] for name in DTYPES] + [["float32", "bfloat16", "float16"]], ids="-".join)
def test_every_dtype_is_kept(dtypes, own_layout, tmp_path):
    model = tiny(dtypes=dtypes)
    if own_layout:
        model = dataclasses.replace(model, source=None)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert_same(again, model)
    assert (json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "hasten") == own_layout


def test_what_config_cannot_say_goes_into_the_sidecar(tmp_path):
    model = tiny()
    wider = dataclasses.replace(model, source=Source("llama", CONFIG | {"max_position_embeddings": 128}))  # no longer its config
    save(wider, tmp_path / "model")
    assert json.loads((tmp_path / "model/hasten.json").read_text())["spec"]["kind"] == "spec"
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "hasten"
    again = load(tmp_path / "model")
    assert again.source == wider.source  # what it was made from is remembered
    assert_same(again, model)


def test_provenance_round_trips(tmp_path):
    steps = (
        Provenance("quantize", {"bits": 4, "group": 128, "skip": ["head"]}, {"loss": [2.27, 2.29], "kept": True}),
        Provenance("prune", {"text": "größer\n漢字"}, {}),
    )
    save(dataclasses.replace(tiny(), provenance=steps), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    assert load(tmp_path / "b").provenance == steps
    assert (tmp_path / "a/hasten.json").read_bytes() == (tmp_path / "b/hasten.json").read_bytes()


def test_generation_settings_and_tokenizer_go_along(tmp_path):
    bundled = load("code-8m")
    save(bundled, tmp_path / "model")
    again = load(tmp_path / "model")
    assert_same(again, bundled)
    assert again.generation == bundled.generation
    assert again.eos_token_ids == (0,)
    assert again.text_tokenizer().encode("def f(x):") == bundled.text_tokenizer().encode("def f(x):")
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (bundled_directory("code-8m") / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_shards_load(config, tmp_path):
    model = tiny(config)
    save(model, tmp_path / "model", max_shard_bytes=20_000)
    names = listing(tmp_path / "model")
    assert "model.safetensors" not in names
    assert "model.safetensors.index.json" in names
    assert sum(name.startswith("model-0") for name in names) >= 3
    assert_same(load(tmp_path / "model"), model)


def test_tied_weights_are_written_once(tmp_path):
    save(tiny(TIED), tmp_path / "model")
    file = SafetensorsFile.open(tmp_path / "model/model.safetensors")
    assert "lm_head.weight" not in file.entries
    assert "head.weight" not in load(tmp_path / "model").weights


def test_a_tied_head_may_be_repeated(tmp_path):
    model = tiny(TIED)
    save(model, tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_same(load(tmp_path / "model"), model)


def test_a_head_that_is_not_tied_must_be_there(tmp_path):
    save(tiny(), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight missing"):
        load(tmp_path / "model")


def test_names_without_the_base_prefix(tmp_path):
    model = tiny(TIED)
    save(model, tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert_same(load(tmp_path / "model"), model)


def test_buffers_that_are_no_weights_are_passed_over(tmp_path):
    model = tiny()
    save(model, tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert_same(load(tmp_path / "model"), model)


def test_a_single_file_of_any_name_will_do(tmp_path):
    model = tiny()
    save(model, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/weights.safetensors")
    assert_same(load(tmp_path / "model"), model)


def test_load_takes_paths_and_strings_and_links(tmp_path, monkeypatch):
    save(tiny(), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "model", str(tmp_path / "model"), "model", "./model", "link"):
        assert load(name).weights.parameters == tiny().weights.parameters
    assert load_directory(tmp_path / "model", "a name").name == "a name"


# --- whole or not at all


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for name in ("notes", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is not empty"):
            save(tiny(), tmp_path / name)
    assert listing(tmp_path) == ["file", "notes"]
    assert listing(tmp_path / "notes") == ["precious.txt"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    save(tiny(), tmp_path / "model")
    assert_same(load(tmp_path / "model"), tiny())
    assert listing(tmp_path) == ["model"]


def test_parents_are_made(tmp_path):
    save(tiny(), tmp_path / "a/b/model")
    assert listing(tmp_path / "a/b") == ["model"]


def test_overwrite_replaces_everything(tmp_path):
    save(tiny(), tmp_path / "model", max_shard_bytes=20_000)
    for name in ("tokenizer.json", "merges.txt", "vocab.txt", "tokenizer.model", "README.md", "LICENSE.txt", "chat_template.jinja"):
        (tmp_path / "model" / name).write_text("old")
    save(tiny(TIED, seed=1), tmp_path / "model", overwrite=True)
    assert listing(tmp_path / "model") == ["config.json", "hasten.json", "model.safetensors"]
    assert listing(tmp_path) == ["model"]
    assert_same(load(tmp_path / "model"), tiny(TIED, seed=1))


@pytest.mark.parametrize("name", ["thesis.txt", "data.csv", ".git/HEAD", "original/consolidated.pth", "train.py", "\x1b[2J\n"])
def test_overwrite_never_deletes_what_is_no_model(name, tmp_path):
    save(tiny(), tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("mine")
    before = listing(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model holds '.*no part of a model") as caught:
        save(tiny(seed=1), tmp_path / "model", overwrite=True)
    assert str(caught.value).isprintable()
    assert name.split("/")[0] in str(caught.value) or name.startswith("\x1b")
    assert listing(tmp_path / "model") == before
    assert listing(tmp_path) == ["model"]
    assert_same(load(tmp_path / "model"), tiny())


def test_overwrite_takes_a_model_directory_only(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.json").write_text("[]")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, said in (("notes", "has no config.json"), ("file", "is a file")):
        with pytest.raises(CheckpointError, match=f"{name} {said}"):
            save(tiny(), tmp_path / name, overwrite=True)
    save(tiny(), tmp_path / "empty", overwrite=True)
    assert listing(tmp_path) == ["empty", "file", "notes"]
    assert listing(tmp_path / "notes") == ["todo.json"]


def test_what_appears_beside_the_model_while_it_is_written_stays(tmp_path):
    save(tiny(), tmp_path / "model")
    model = tiny(seed=1)
    weights = dict(model.weights)
    array = model.weights.array("norm.weight")

    def load_weight():
        (tmp_path / "model/thesis.txt").write_text("mine")
        return array

    weights["norm.weight"] = dataclasses.replace(weights["norm.weight"], load=load_weight)
    with pytest.raises(CheckpointError, match="holds 'thesis.txt'"):
        save(dataclasses.replace(model, weights=Weights(weights)), tmp_path / "model", overwrite=True)
    assert "thesis.txt" in listing(tmp_path / "model")
    assert listing(tmp_path) == ["model"]


def test_a_sidecar_holds_nothing_unknown(tmp_path):
    save(tiny(), tmp_path / "model")
    path = tmp_path / "model/hasten.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenence\n": []}))
    with pytest.raises(ConfigError, match=r"hasten.json: .*unknown field .provenence") as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_model_can_be_saved_over_itself(tmp_path):
    save(tiny(), tmp_path / "model")
    model = load(tmp_path / "model")
    changed = dataclasses.replace(model, provenance=(Provenance("touch"),))
    save(changed, tmp_path / "model", overwrite=True)
    assert_same(load(tmp_path / "model"), tiny())
    assert load(tmp_path / "model").provenance == (Provenance("touch"),)
    assert_same(model, tiny())  # what was mapped is still there


def failing(model, error):
    def load_weight():
        raise error

    weights = dict(model.weights)
    name = list(weights)[-1]
    weights[name] = dataclasses.replace(weights[name], load=load_weight)
    return dataclasses.replace(model, weights=Weights(weights))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_a_failing_save_leaves_nothing_and_the_old_intact(error, tmp_path):
    broken = failing(tiny(seed=1), error)
    with pytest.raises((type(error), UserError)):
        save(broken, tmp_path / "new")
    assert listing(tmp_path) == []
    save(tiny(), tmp_path / "old")
    with pytest.raises((type(error), UserError)):
        save(broken, tmp_path / "old", overwrite=True)
    assert listing(tmp_path) == ["old"]
    assert_same(load(tmp_path / "old"), tiny())


@pytest.mark.parametrize("call", [0, 1])
def test_a_directory_that_cannot_be_put_in_place_leaves_the_old(call, tmp_path, monkeypatch):
    save(tiny(), tmp_path / "model")
    replace, calls = os.replace, []

    def fails_once(source, target):
        if "model" in {os.path.basename(source), os.path.basename(target)}:  # the directory itself, not its files
            calls.append(target)
            if len(calls) == call + 1:
                raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(PermissionError):
        save(tiny(seed=1), tmp_path / "model", overwrite=True)
    assert len(calls) == 1 + 2 * call  # and back
    assert listing(tmp_path) == ["model"]
    assert_same(load(tmp_path / "model"), tiny())


def test_a_wrong_promise_is_refused(tmp_path):
    model = tiny()
    weights = dict(model.weights)
    weights["norm.weight"] = dataclasses.replace(weights["norm.weight"], load=lambda: np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match="norm"):
        save(dataclasses.replace(model, weights=Weights(weights)), tmp_path / "model")
    assert listing(tmp_path) == []


def test_saved_files_can_be_read_by_others(tmp_path):
    save(tiny(), tmp_path / "model")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


# --- lazily

_MEASURE = """
import sys, time
from hasten import load
from tests.cli import peak_bytes
load(sys.argv[2])  # imports, and what is made once
before, began = peak_bytes(), time.perf_counter()
model = load(sys.argv[1])
print(time.perf_counter() - began, peak_bytes() - before, model.weights.nbytes)
row = model.weights.array("embedding.weight")[-1]
assert row.shape == (4096,) and not row.any()
print(peak_bytes() - before)
"""


@pytest.mark.timed
def test_loading_reads_headers_only(tmp_path):
    """2.4 GB of weights that take no disk: a hole in a file."""
    config = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4,
        "num_attention_heads": 32,
    }  # fmt: skip
    spec = find_family("llama").spec(config)
    entries, end = {}, 0
    family_map = find_family("llama").tensors(spec, config)
    shapes = lower(spec).params
    for mapping in family_map:
        (source,), (target,) = mapping.sources, mapping.targets
        size = 2 * int(np.prod(shapes[target]))
        entries[source] = {"dtype": "BF16", "shape": list(shapes[target]), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    with open(big / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    (big / "config.json").write_text(json.dumps(config))
    save(tiny(), small)
    command, environment = [sys.executable, "-c", _MEASURE, big, small], {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    (seconds, grown, nbytes), (after,) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert nbytes == end > 2e9
    assert seconds < 2
    assert grown < 100 << 20
    assert after < 100 << 20


# --- tokenizers


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["tokenizer.model"], "sentencepiece.*no tokenizer.json.*save_pretrained"),
        (["spiece.model"], "sentencepiece.*no tokenizer.json.*save_pretrained"),
        (["cl100k.tiktoken"], "tiktoken.*no tokenizer.json.*save_pretrained"),
        (["vocab.json", "merges.txt"], "vocab.json and merges.txt.*no tokenizer.json.*save_pretrained"),
        ([], "no tokenizer.json.*token ids.*add the tokenizer.json"),
    ],
    ids=["sentencepiece", "spiece", "tiktoken", "vocab", "none"],
)
def test_a_missing_tokenizer_says_what_is_there(files, message, tmp_path):
    save(tiny(), tmp_path / "model")
    for name in files:
        (tmp_path / "model" / name).write_bytes(b"{}")
    model = load(tmp_path / "model")
    assert model.tokenizer is None
    with pytest.raises(TokenizerError, match=message) as caught:
        model.text_tokenizer()
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, (5,)),
        ({"eos_token_id": [5, 7]}, {}, (5, 7)),
        ({}, {"eos_token_id": 6}, (6,)),
        ({"eos_token_id": None}, {"eos_token_id": [6]}, (6,)),
        ({"eos_token_id": []}, {}, ()),
        ({}, {}, ()),
    ],
)
def test_end_of_text_ids(generation, config, expected):
    model = dataclasses.replace(tiny(), generation=generation, source=Source("llama", CONFIG | config))
    assert model.eos_token_ids == expected


def test_bfloat16_is_mapped_not_converted(tmp_path):
    save(tiny(dtypes=["bfloat16"]), tmp_path / "model")
    model = load(tmp_path / "model")
    first, second = (model.weights.array("embedding.weight") for _ in range(2))
    assert np.shares_memory(first, second)
