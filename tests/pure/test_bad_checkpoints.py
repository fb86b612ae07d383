"""Whatever is wrong with a checkpoint or a command: one clear line, exit code 2, bounded time and memory, and none of its code is run."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from hasten.base.errors import ConfigError, UserError, one_line
from hasten.checkpoint import save
from hasten.families import all_families, find_family
from hasten.families.config import PARTS_LIMIT
from hasten.formats.weights import Weight, Weights
from hasten.model import Model, Source
from hasten.program import lower
from tests.cli import assert_refused, main, run

SECONDS = 15
HEADROOM = 600 << 20
CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A tiny llama on disk, written by hasten."""
    family = find_family("llama")
    spec = family.spec(CONFIG)
    rng = np.random.default_rng(0)

    def weight(shape):
        array = rng.standard_normal(shape, np.float32)
        return Weight(shape, array.dtype, lambda: array)

    weights = Weights({name: weight(shape) for name, shape in lower(spec).params.items()})
    directory = tmp_path_factory.mktemp("good") / "model"
    save(Model(name="tiny", spec=spec, weights=weights, source=Source("llama", CONFIG)), directory)
    return directory


@pytest.fixture(scope="session")
def usual_peak(good):
    """Peak memory of a command that goes well."""
    outcome = run("inspect", good, measured=True)
    assert outcome.code == 0, outcome.err
    return outcome.peak_bytes


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


# --- ways to break a checkpoint: functions of its directory


def config(**changes):
    """Change keys of config.json; ``...`` removes one."""

    def mutate(directory):
        path = directory / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return mutate


def text(name, content):
    """Replace a file."""

    def mutate(directory):
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return mutate


def number(key, digits):
    """A config whose ``key`` is exactly these characters."""

    def mutate(directory):
        config(**{key: "HERE"})(directory)
        path = directory / "config.json"
        path.write_text(path.read_text().replace('"HERE"', digits))

    return mutate


def both(*mutations):
    def mutate(directory):
        for each in mutations:
            each(directory)

    return mutate


def header(change, data=lambda data: data):
    """Rewrite the header of the weights; ``change`` edits it in place."""

    def mutate(directory):
        entries, payload = read_header(directory / WEIGHTS)
        entries = change(entries) or entries
        write_header(directory / WEIGHTS, entries, data(payload))

    return mutate


def read_header(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path, entries, payload):
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)


def shard(directory, name, keep):
    """Write the tensors that ``keep`` picks into a file of their own."""
    entries, payload = read_header(directory / WEIGHTS)
    chosen, data = {}, b""
    for tensor, entry in entries.items():
        if tensor != "__metadata__" and keep(tensor):
            piece = payload[slice(*entry["data_offsets"])]
            chosen[tensor] = entry | {"data_offsets": [len(data), len(data) + len(piece)]}
            data += piece
    write_header(directory / name, chosen, data)
    return chosen


def shards(second=lambda name: name == NORM, first=lambda name: name != NORM, index=True, remove=None):
    def mutate(directory):
        weight_map = {}
        for name, keep in (("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)):
            weight_map |= dict.fromkeys(shard(directory, name, keep), name)
        (directory / WEIGHTS).unlink()
        if index:
            (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        if remove:
            (directory / remove).unlink()

    return mutate


def index(weight_map):
    return text(INDEX, json.dumps({"weight_map": weight_map}))


def rename_tensor(old, new):
    def change(entries):
        entries[new] = entries.pop(old)

    return header(change)


def retype(name, **changes):
    def change(entries):
        entries[name] |= changes

    return header(change)


def drop(directory):
    chosen = shard(directory, "other.safetensors", lambda name: name != DOWN)
    assert DOWN not in chosen
    os.replace(directory / "other.safetensors", directory / WEIGHTS)


def add(directory):
    entries, payload = read_header(directory / WEIGHTS)
    entries["model.extra"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(payload), len(payload) + 8]}
    write_header(directory / WEIGHTS, entries, payload + bytes(8))


def overlap(entries):
    entries[DOWN]["data_offsets"] = [offset - 4 for offset in entries[DOWN]["data_offsets"]]


def pickled(directory):
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(directory / "canary")))


def pickled_as_safetensors(directory):
    (directory / WEIGHTS).write_bytes(pickle.dumps(Canary(directory / "canary")))


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil(model_type, reference="modeling_evil.EvilForCausalLM"):
    """A checkpoint that brings code, as `trust_remote_code` would run it."""

    def mutate(directory):
        config(model_type=model_type, auto_map={"AutoModelForCausalLM": reference})(directory)
        (directory / "modeling_evil.py").write_text(f"open({str(directory / 'canary')!r}, 'w').close()\n")

    return mutate


def sized(name, size):
    def mutate(directory):
        with open(directory / name, "wb") as file:
            file.truncate(size)

    return mutate


def link_loop(name):
    def mutate(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(directory / name)

    return mutate


def only_tokenizer(name):
    def mutate(directory):
        for path in directory.iterdir():
            path.unlink()
        (directory / name).write_text("{}")

    return mutate


HUGE = "1" + "0" * 5000
LONG = "1" + "0" * 4000
DEEP = "[" * 100_000

# name: how it is broken, and what the line must say
CHECKPOINTS = {
    "weights truncated": (header(lambda entries: None, lambda data: data[:-100]), [WEIGHTS, "truncated", "download"]),
    "weights with bytes to spare": (header(lambda entries: None, lambda data: data + b"abc"), [WEIGHTS, "3 bytes after"]),
    "weights overlap": (header(overlap), [WEIGHTS, "overlaps"]),
    "header longer than the file": (text(WEIGHTS, struct.pack("<Q", 5000) + b"{}"), [WEIGHTS, "5000"]),
    "header longer than any": (text(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), [WEIGHTS, str(1 << 62), "at most"]),
    "header no JSON": (text(WEIGHTS, struct.pack("<Q", 8) + b"{nonsens"), [WEIGHTS, "damaged header"]),
    "header nested": (text(WEIGHTS, struct.pack("<Q", 50_000) + b'{"a":' * 10_000), [WEIGHTS]),
    "weights empty": (text(WEIGHTS, b""), [WEIGHTS, "0 bytes"]),
    "weights a Git LFS pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "git lfs pull"]),
    "dtype unknown": (retype(DOWN, dtype="F13"), [DOWN, "F13", "BF16"]),
    "dtype no weight has": (retype(DOWN, dtype="I32"), [DOWN, "int32", "bfloat16"]),
    "shape of another model": (retype(DOWN, shape=[56, 32]), ["[56, 32]", "[32, 56]"]),
    "shape of another size": (config(intermediate_size=64), ["[56, 32]", "[64, 32]"]),
    "tensor missing": (drop, [DOWN, "missing"]),
    "tensor extra": (add, ["model.extra", "config.json"]),
    "tensor misnamed": (rename_tensor(DOWN, "model.layers.9.mlp.down_proj.weight"), ["model.layers.9.mlp.down_proj.weight"]),
    "tensor name of many lines": (rename_tensor(NORM, "a\n" * 500), ["'a\\na"]),
    "tensor in two shards": (shards(second=lambda name: name in (NORM, DOWN)), [DOWN, "another shard"]),
    "shards without index": (shards(index=False), ["2 *.safetensors", INDEX]),
    "shard missing": (shards(remove="model-00002-of-00002.safetensors"), ["model-00002-of-00002.safetensors", "missing"]),
    "index escapes": (index({"a": "../../../../etc/passwd"}), ["../../etc/passwd", INDEX]),
    "index escapes to safetensors": (index({"a": "../x.safetensors"}), ["../x.safetensors", INDEX]),
    "index absolute": (index({"a": "/etc/x.safetensors"}), ["/etc/x.safetensors", INDEX]),
    "index of numbers": (index({"a": 7}), ["7", INDEX]),
    "index of lists": (index({"a": ["x.safetensors"]}), ["x.safetensors", INDEX]),
    "index without map": (text(INDEX, "{}"), ["weight_map", INDEX]),
    "index no JSON": (text(INDEX, "{"), [INDEX, "not valid JSON"]),
    "no weights": (lambda directory: (directory / WEIGHTS).unlink(), ["no *.safetensors"]),
    "weights a folder": (lambda directory: [(directory / WEIGHTS).unlink(), (directory / WEIGHTS).mkdir()], [WEIGHTS, "directory"]),
    "weights a link to itself": (link_loop(WEIGHTS), ["safetensors"]),
    "config a link to itself": (link_loop("config.json"), ["config.json"]),
    "config a folder": (lambda directory: [(directory / "config.json").unlink(), (directory / "config.json").mkdir()], ["config.json"]),
    "config missing": (lambda directory: (directory / "config.json").unlink(), ["not a model directory", WEIGHTS]),
    "config no JSON": (text("config.json", "model_type: llama"), ["config.json", "not valid JSON"]),
    "config not UTF-8": (text("config.json", b'{"model_type": "\xff"}'), ["config.json", "not valid JSON"]),
    "config a list": (text("config.json", "[1, 2]"), ["config.json", "[1, 2]", "an object"]),
    "config null": (text("config.json", "null"), ["config.json", "None"]),
    "config empty": (text("config.json", ""), ["config.json", "not valid JSON"]),
    "config nested": (text("config.json", DEEP), ["config.json"]),
    "config nested inside": (number("rope_parameters", '{"a":' * 500 + "1" + "}" * 500), ["rope"]),
    "config with NaN": (number("rms_norm_eps", "NaN"), ["config.json", "NaN", "finite"]),
    "config with -Infinity": (number("rms_norm_eps", "-Infinity"), ["config.json", "-Infinity"]),
    "config with Infinity": (number("rms_norm_eps", "Infinity"), ["rms_norm_eps", "inf", "finite"]),
    "config with 1e999": (number("rms_norm_eps", "1e999"), ["rms_norm_eps", "inf", "finite"]),
    "number of 5000 digits": (number("hidden_size", HUGE), ["config.json"]),
    "number of 4000 digits": (number("hidden_size", LONG), ["hidden_size", "bits"]),
    "float of 4000 digits": (number("rms_norm_eps", LONG), ["rms_norm_eps", "bits"]),
    "rope base tiny": (config(rope_theta=5e-324, head_dim=1024), ["base 5e-324", "no float"]),
    "rope factor of 4000 digits": (number("rope_scaling", f'{{"rope_type": "linear", "factor": {LONG}}}'), ["factor", "bits"]),
    "rotary share huge": (config(partial_rotary_factor=1e308), ["partial_rotary_factor"]),
    "model_type missing": (config(model_type=...), ["model_type", "llama"]),
    "model_type null": (config(model_type=None), ["model_type", "llama"]),
    "model_type unknown": (config(model_type="frankenstein"), ["frankenstein", "llama"]),
    "model_type a list": (config(model_type=["llama"]), ["['llama']"]),
    "model_type hasten without spec": (config(model_type="hasten"), ["hasten.json"]),
    "size a string": (config(hidden_size="32"), ["hidden_size", "'32'", "whole number"]),
    "size a float": (config(hidden_size=32.0), ["hidden_size", "32.0", "whole number"]),
    "size true": (config(hidden_size=True), ["hidden_size", "True"]),
    "size null": (config(hidden_size=None), ["hidden_size", "missing"]),
    "size zero": (config(hidden_size=0), ["hidden_size", "0"]),
    "size negative": (config(num_attention_heads=-4), ["num_attention_heads", "-4"]),
    "vocabulary of 2**31": (config(vocab_size=2**31), ["vocab_size", str(2**31)]),
    "vocabulary of 2**31 - 1": (config(vocab_size=2**31 - 1), ["vocab_size", str(2**24)]),
    "layers 10**9": (config(num_hidden_layers=10**9), ["num_hidden_layers", "1000000000", str(PARTS_LIMIT)]),
    "layers as many as are read": (config(num_hidden_layers=PARTS_LIMIT), ["missing"]),
    "heads that do not divide": (config(num_key_value_heads=3), ["4", "3"]),
    "head dimension 2**24": (config(head_dim=2**24), ["config.json"]),
    "head dimension odd": (config(head_dim=7), ["7"]),
    "context 2**30": (config(max_position_embeddings=2**30), ["max_position_embeddings", str(2**24)]),
    "activation unknown": (config(hidden_act="swoosh"), ["hidden_act", "swoosh", "silu"]),
    "key unknown": (config(secret_sauce=3), ["secret_sauce", "3"]),
    "key unknown and huge": (config(secret_sauce=list(range(200_000))), ["secret_sauce"]),
    "quantized": (config(quantization_config={"quant_method": "aqlm", "bits": 2}), ["quant_method", "aqlm", "compressed-tensors"]),
    "sidecar of a newer hasten": (text("hasten.json", '{"schema_version": 99}'), ["hasten.json", "99", "upgrade"]),
    "sidecar version huge": (text("hasten.json", f'{{"schema_version": {LONG}}}'), ["hasten.json", "bits", "upgrade"]),
    "sidecar without version": (text("hasten.json", "{}"), ["hasten.json", "schema_version"]),
    "sidecar no JSON": (text("hasten.json", "{"), ["hasten.json", "not valid JSON"]),
    "sidecar nested": (text("hasten.json", DEEP), ["hasten.json"]),
    "sidecar a list": (text("hasten.json", "[]"), ["hasten.json"]),
    "sidecar of wrong types": (text("hasten.json", '{"schema_version": 1, "provenance": 7}'), ["hasten.json", "provenance"]),
    "sidecar with a bad spec": (text("hasten.json", '{"schema_version": 1, "spec": {"kind": "spec"}}'), ["hasten.json", "spec"]),
    "generation_config no JSON": (text("generation_config.json", "{"), ["generation_config.json", "not valid JSON"]),
    "generation_config with NaN": (text("generation_config.json", '{"temperature": NaN}'), ["generation_config.json", "NaN"]),
    "generation_config a list": (text("generation_config.json", "[]"), ["generation_config.json"]),
    "tokenizer_config no JSON": (
        both(text("tokenizer.json", "{}"), text("tokenizer_config.json", "{")), ["tokenizer_config.json", "not valid JSON"],
    ),
    "tokenizer_config a list": (both(text("tokenizer.json", "{}"), text("tokenizer_config.json", "[]")), ["tokenizer_config.json"]),
    "chat template not UTF-8": (both(text("tokenizer.json", "{}"), text("chat_template.jinja", b"\xff")), ["chat_template.jinja", "UTF-8"]),
    "only a tokenizer": (only_tokenizer("tokenizer.json"), ["not a model directory", "tokenizer.json"]),
    "empty folder": (lambda directory: [path.unlink() for path in directory.iterdir()], ["not a model directory", "nothing"]),
    "pickle for safetensors": (pickled_as_safetensors, [WEIGHTS, "pickle", "never"]),
}  # fmt: skip

# The same, for what could take time, memory, or run code: each in a process of its own.
DANGERS = {
    "pickle": (pickled, ["pytorch_model.bin", "never read", "safetensors"]),
    "code, known family": (evil("llama"), ["modeling_evil.py", "never"]),
    "code, known family, from elsewhere": (evil("llama", "org/repo--modeling_evil.EvilForCausalLM"), ["modeling_evil.py", "never"]),
    "code, unknown family": (evil("evil"), ["auto_map", "never"]),
    "code in a list": (evil("llama", [None, "modeling_evil.Evil"]), ["modeling_evil.py", "never"]),
    "layers 10**9": (config(num_hidden_layers=10**9), ["num_hidden_layers"]),
    "layers as many as are read": (config(num_hidden_layers=PARTS_LIMIT), ["missing"]),
    "experts": (
        config(model_type="mixtral", num_local_experts=PARTS_LIMIT, num_hidden_layers=PARTS_LIMIT), ["experts", str(PARTS_LIMIT**2)],
    ),
    "head dimension 2**24": (config(head_dim=2**24, num_hidden_layers=PARTS_LIMIT), ["config.json"]),
    "head dimension as long as is read": (config(head_dim=2**12, num_hidden_layers=PARTS_LIMIT), ["missing"]),
    "head dimension beyond what rotates": (config(head_dim=2**16, num_hidden_layers=PARTS_LIMIT), ["65536", "4096"]),
    "alibi heads": (config(model_type="bloom", n_head=2**31 - 1, n_layer=2), ["n_head"]),
    "config of 100 MB": (sized("config.json", 100 << 20), ["config.json", "104,857,600", "at most"]),
    "config of 4 MB of brackets": (number("secret_sauce", "[" + "[]," * (1 << 20) + "[]]"), ["secret_sauce"]),
    "sidecar of 100 MB": (sized("hasten.json", 100 << 20), ["hasten.json", "at most"]),
    "tokenizer_config of 100 MB": (
        both(text("tokenizer.json", "{}"), sized("tokenizer_config.json", 100 << 20)), ["tokenizer_config.json", "at most"],
    ),
    "weights of 4 GB of nothing": (sized(WEIGHTS, 4 << 30), [WEIGHTS]),
    "header of 90 MB": (
        lambda directory: (directory / WEIGHTS).write_bytes(struct.pack("<Q", 90_000_000) + b'{"a":[' + b"[]," * 29_999_998), [WEIGHTS],
    ),
    "sidecar of many blocks": (
        both(
            config(model_type="hasten"),
            lambda directory: text("hasten.json", many_blocks(90_000))(directory),
        ),
        ["blocks"],
    ),
}  # fmt: skip


def many_blocks(count):
    data = {"schema_version": 1, "spec": json.loads(find_family("llama").spec(CONFIG).to_json())}
    block = {"kind": "block", "mixer": None, "feed_forward": {"kind": "mlp", "hidden": 1, "activation": "relu"}}
    block["wiring"] = {"kind": "pre_norm", "mixer": {"kind": "rms_norm", "eps": 0}, "feed_forward": None}
    data["spec"]["blocks"] = "HERE"
    return json.dumps(data).replace('"HERE"', "[" + ",".join([json.dumps(block, separators=(",", ":"))] * count) + "]")


@pytest.mark.row("model files", "damaged checkpoints")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, copy, monkeypatch, capsys):
    mutate, fragments = CHECKPOINTS[case]
    mutate(copy)
    assert_refused(main(monkeypatch, capsys, "inspect", copy), *fragments)


@pytest.mark.row("model files", "damaged checkpoints")
@pytest.mark.parametrize("case", DANGERS)
def test_dangerous_checkpoint(case, copy, usual_peak):
    mutate, fragments = DANGERS[case]
    mutate(copy)
    outcome = run("inspect", copy, measured=True)
    assert_refused(outcome, *fragments)
    assert outcome.peak_bytes > 0
    assert outcome.seconds < SECONDS
    assert outcome.peak_bytes < usual_peak + HEADROOM
    assert not (copy / "canary").exists()


@pytest.mark.row("remote code", "canaries, under -O too")
@pytest.mark.parametrize("model_type", ["llama", "evil"])
@pytest.mark.parametrize("command", [["generate", "--token-ids", "1,2"], ["eval"], ["chat"]], ids=lambda command: command[0])
def test_no_command_runs_code_of_a_checkpoint(model_type, command, copy):
    evil(model_type)(copy)
    name, *rest = command
    outcome = run(name, copy, *rest, options=["-O"], stdin="hello\n")
    assert_refused(outcome, "auto_map", "never")
    assert not (copy / "canary").exists()


def test_code_that_is_not_there_is_no_reason_to_refuse(copy):
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"})(copy)
    assert run("inspect", copy).code == 0


# --- what is not a checkpoint at all


def test_paths_that_are_no_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, fragments in {
        "model.gguf": ["model.gguf", "24 bytes", "GGUF", "download it again"],
        "notes.txt": ["notes.txt", "directory"],
        "loop": ["loop", "not a directory", "code-8m"],
        "dangling": ["dangling", "not a directory"],
        "nowhere": ["nowhere", "not a directory", "random:SHAPE"],
        "a" * 5000: ["aaa", "too long"],
        "notes.txt/model": ["notes.txt/model", "not a directory"],
    }.items():
        assert_refused(main(monkeypatch, capsys, "inspect", tmp_path / name), *fragments)
    for name, fragments in {
        "": ["''"],
        "~nobody-of-that-name/model": ["nobody-of-that-name"],
        "no such\nmodel": ["no such\\nmodel"],
        "random:NOPE": ["NOPE", "tinyllama-1.1b"],
        "random:": ["''", "tinyllama-1.1b"],
        "../models": ["../models"],
        "a/b/c": ["a/b/c"],
        "\x00": ["x00"],
    }.items():
        assert_refused(main(monkeypatch, capsys, "inspect", name), *fragments)


@pytest.mark.parametrize("name", ["", "config.json", WEIGHTS])
def test_forbidden(name, copy, monkeypatch, capsys):
    (copy / name).chmod(0)
    if os.access(copy / name, os.R_OK):
        pytest.skip("nothing is forbidden to root")
    try:
        assert_refused(main(monkeypatch, capsys, "inspect", copy), "ermission")
    finally:
        (copy / name).chmod(0o755)


def test_hub_id_offline():
    outcome = run("inspect", "nobody/nothing-of-that-name", env={"HF_HUB_OFFLINE": "1"})
    assert_refused(outcome, "nobody/nothing-of-that-name", "directory")
    assert outcome.seconds < SECONDS


def test_hub_id_with_a_dead_network(tmp_path):
    dead = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    outcome = run("generate", "nobody/nothing-of-that-name", "-p", "x", env=dead)
    assert_refused(outcome, "nobody/nothing-of-that-name", "directory")
    assert outcome.seconds < SECONDS


# --- arguments


@pytest.mark.parametrize(
    "arguments", [["generate"], ["inspect", "x", "--nope"], ["nope"], ["generate", "code-8m", "-n", "many"], ["eval", "x", "--limit", "0"]]
)
def test_wrong_usage_exits_2(arguments, monkeypatch, capsys):
    outcome = main(monkeypatch, capsys, *arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


# --- any value under any key of any family

VALUES = [
    None, True, -1, 0, 1, 2, 3, 7, 4096, 4097, 2**24, 2**31 - 1, 2**31, 10**400, 10**5000, 0.5, -0.0, 1e308, -1e308, 5e-324, float("inf"),
    float("nan"), "", "x", "auto", [], [1], [None, "x"], [10**400], [float("nan"), 1], {}, {"rope_type": "yarn", "factor": 1e308},
    {"rope_type": "linear", "factor": 5e-324}, {"rope_type": 10**5000}, {"a": {"b": [1]}},
]  # fmt: skip


@pytest.mark.parametrize("family", list(all_families()), ids=lambda family: family.name)
def test_any_value_under_any_key(family):
    for example in family.examples:
        for key in {*example, "rope_theta", "rope_scaling"}:
            for value in VALUES:
                line = refusal(family, {**example, key: value})
                assert "\n" not in line
                assert len(line) < 1000


def refusal(family, config):
    """What hasten says of a config, nothing where it takes it. Any error but a UserError escapes."""
    try:
        spec = family.spec(config)
        family.tensors(spec, config)
        if len(spec.blocks) < 100:
            lower(spec)
    except UserError as error:
        return str(error)
    return ""


# --- the line itself


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(10**5000),
        [10**5000],
        list(range(10**6)),
        "x" * 10**6,
        b"x" * 10**6,
        {"a": {"b": "c" * 10**6}},
        ((1,),) * 10**5,
        "a\nb\r\x1b",
    ],
    ids=range(9),
)
def test_one_line_is_short_whatever_the_value(value):
    line = one_line(value)
    assert len(line) <= 120
    assert line.isprintable()


def test_one_line_of_something_deep():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(one_line(deep)) == 120


@pytest.mark.parametrize("value", [1, -1.5, None, True, "it's", b"a", [], [1, [2]], (), (1,), (1, "a"), {}, {"a": [1], 2: ()}, {3}])
def test_one_line_of_something_short_is_its_repr(value):
    assert one_line(value) == repr(value)


def test_errors_are_user_errors():
    with pytest.raises(ConfigError, match="hidden_size"):
        find_family("llama").spec(CONFIG | {"hidden_size": 10**5000})
