"""Whatever is wrong with text, a tokenizer or an argument of a command that runs a model: one clear line and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hasten.base.errors import TokenizerError, UserError
from hasten.checkpoint import bundled_directory, save
from hasten.measure import Windows, evaluate
from hasten.model.tokenizer import Tokenizer
from tests.cli import ENVIRONMENT, assert_refused, main, run
from tests.pure.test_checkpoint import rewrite, tiny

DEEP = "[" * 100_000


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "model"
    save(tiny(), directory)
    return directory


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


# --- text asked of a model without tokenizer, or with a broken one


@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["chat"], ["eval"]], ids=lambda command: command[0])
def test_text_without_tokenizer(command, good):
    name, *rest = command
    assert_refused(run(name, good, *rest, stdin="hello\n"), "no tokenizer.json", "token ids")


@pytest.mark.parametrize("content", ["{}", "{", "[]", "", b"\xff", DEEP, '{"model": {"type": "Nope"}}'], ids=range(7))
def test_broken_tokenizer(content, copy, monkeypatch, capsys):
    (copy / "tokenizer.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(main(monkeypatch, capsys, "generate", copy, "-p", "x"), "tokenizer.json")
    assert main(monkeypatch, capsys, "inspect", copy).code == 0  # nobody asked for text


def tokenizer_with(directory, **parts):
    """A word-level `tokenizer.json` of "a" and "b", with these parts instead of none."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"}
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}} | parts))
    return path


CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
BAD_BYTES = b"\xff\xfe".decode("utf-8", "surrogateescape")  # as the interpreter decodes an argument


def test_a_tokenizer_that_lacks_its_unknown_token(copy, monkeypatch, capsys):
    tokenizer_with(copy, model=NO_UNKNOWN)
    assert_refused(main(monkeypatch, capsys, "generate", copy, "-p", "zzz"), "tokenizer.json", "cannot encode", "[UNK]")


def test_a_tokenizer_that_panics(copy, monkeypatch, capsys):
    tokenizer_with(copy, pre_tokenizer=CATASTROPHE)
    assert_refused(main(monkeypatch, capsys, "generate", copy, "-p", "a" * 40 + "!"), "tokenizer.json", "cannot encode", "retry-limit")


def test_every_failure_of_the_library_is_a_tokenizer_error(tmp_path):
    tokenizer = Tokenizer(tokenizer_with(tmp_path, pre_tokenizer=CATASTROPHE), {"bos_token": "\ud800"}, None)
    tokens = tokenizer.encode("a")
    for fails in (lambda: tokenizer.encode("a" * 40 + "!"), lambda: tokenizer.decode([-1]), lambda: tokenizer.decode([1 << 40]),
                  lambda: tokenizer.start_id, lambda: tokenizer.encode("a" * 40 + "!")):  # fmt: skip
        with pytest.raises(TokenizerError, match="tokenizer.json: cannot ") as caught:
            fails()
        assert "\n" not in str(caught.value)
        assert tokenizer.encode("a") == tokens  # no failure outlives its call


def test_interrupts_pass(tmp_path):
    tokenizer = Tokenizer(tokenizer_with(tmp_path), {}, None)
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), tokenizer._guarded("be stopped"):
            raise error


def test_a_tokenizer_too_large_to_read(copy, monkeypatch, capsys):
    with open(copy / "tokenizer.json", "wb") as file:
        file.truncate((256 << 20) + 1)
    assert_refused(main(monkeypatch, capsys, "generate", copy, "-p", "x"), "tokenizer.json", "268,435,457 bytes", "268,435,456")


@pytest.mark.parametrize("text", ["x" + BAD_BYTES, "x\ud800"])
def test_text_that_is_no_utf8(text, monkeypatch, capsys):
    assert_refused(main(monkeypatch, capsys, "generate", "code-8m", "-p", text), "not valid UTF-8 text at character 1")
    assert_refused(main(monkeypatch, capsys, "generate", "code-8m", "-p", "-", stdin=text), "not valid UTF-8 text at character 1")
    done = main(monkeypatch, capsys, "chat", "code-8m", "-n", "2", "-t", "0", stdin=f"{text}\nhello\n")
    assert done.code == 0  # the next question is answered
    assert "not valid UTF-8 text at character" in done.err
    assert done.out.strip()


@pytest.mark.parametrize("command", [["generate", "code-8m", "-p", "-"], ["chat", "code-8m"]], ids=lambda command: command[0])
@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_standard_input_that_is_no_utf8(command, encoding):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "hasten.cli", *command, "-n", "2"]
    done = subprocess.run(command, input=b"x\xff\n", capture_output=True, env=environment, timeout=120, check=False)
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("hasten: ")
    assert "not" in last
    assert "utf-8" in last.lower()
    assert b"Traceback" not in done.stderr
    assert done.returncode == (0 if command[3] == "chat" and "escape" in encoding else 2)


def test_text_of_a_larger_vocabulary(copy, monkeypatch, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_directory("code-8m") / name, copy / name)
    assert_refused(main(monkeypatch, capsys, "generate", copy, "-p", "import numpy"), "outside the vocabulary", "0 to 96")
    (copy / "text").write_text("import numpy as np\n" * 40)
    assert_refused(main(monkeypatch, capsys, "eval", copy, copy / "text", "--window", "16"), "outside the vocabulary", "0 to 96")


def test_weights_of_nan(copy, monkeypatch, capsys):
    rewrite(copy, lambda tensors: {name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()})
    assert main(monkeypatch, capsys, "inspect", copy).code == 0  # nobody looked at them
    assert_refused(main(monkeypatch, capsys, "generate", copy, "--token-ids", "1"), "NaN", "weights")
    tokenizer_with(copy)
    (copy / "text").write_text("a b " * 20)
    for options in ([], ["--json"]):
        outcome = main(monkeypatch, capsys, "eval", copy, copy / "text", "--window", "16", *options)
        assert_refused(outcome, str(copy), "the model's logits are not finite")


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_weight_that_is_no_number(weights, value, copy, monkeypatch, capsys):
    """The native backend plays it, and the engine refuses what comes out, in every format."""

    def spoil(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensor = tensors[name].copy()
        tensor[3, 5] = value
        return tensors | {name: tensor}

    rewrite(copy, spoil)
    arguments = ["generate", copy, "--token-ids", "1,2", "--backend", "cpu", "--weights", weights]
    assert_refused(main(monkeypatch, capsys, *arguments), "logits hold NaN", "weights")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_is_of_finite_logits(value, monkeypatch):
    class Broken:
        def score(self, batch):
            logits = np.zeros((len(batch.rows), 97), np.float32)
            logits[-1, 5] = value
            return logits

    monkeypatch.setattr(evaluate, "open_scorer", lambda *arguments: Broken())
    with pytest.raises(UserError, match="tiny: the model's logits are not finite"):
        list(evaluate.score_windows(tiny(), Windows(((1, 2, 5),), (0,)), window=2))


def test_a_perplexity_beyond_numbers(copy, monkeypatch, capsys):
    rewrite(copy, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * 1e5})
    tokenizer_with(copy)
    (copy / "text").write_text("a b a a b b " * 20)
    arguments = ["eval", copy, copy / "text", "--window", "16"]
    facts = json.loads(main(monkeypatch, capsys, *arguments, "--json").out, parse_constant=pytest.fail)
    assert facts["perplexity"] is None
    assert facts["loss"] > 710
    assert "perplexity inf " in main(monkeypatch, capsys, *arguments).out


# --- arguments

ARGUMENTS = {
    "token id too large": (["--token-ids", "1,97"], ["97", "0 to 96"]),
    "token id far too large": (["--token-ids", "1,99999999999999999999"], ["99999999999999999999", "1,2,3"]),
    "token id negative": (["--token-ids=-1"], ["-1", "1,2,3"]),
    "token ids of words": (["--token-ids", "one,two"], ["'one'", "1,2,3"]),
    "token ids empty": (["--token-ids", ""], ["''", "1,2,3"]),
    "token ids of other digits": (["--token-ids", "²"], ["²", "1,2,3"]),
    "prompt as long as the context": (["--token-ids", ",".join(["1"] * 64)], ["64", "at most 63"]),
    "no prompt": ([], ["--prompt"]),
    "two prompts": (["-p", "x", "--token-ids", "1"], ["--prompt"]),
    "temperature negative": (["--token-ids", "1", "-t", "-1"], ["temperature", "-1", "0 to 100"]),
    "temperature NaN": (["--token-ids", "1", "-t", "nan"], ["temperature", "nan"]),
    "temperature infinite": (["--token-ids", "1", "-t", "inf"], ["temperature", "inf"]),
    "top_p 2": (["--token-ids", "1", "--top-p", "2"], ["top_p", "2.0", "0 to 1"]),
    "top_k negative": (["--token-ids", "1", "--top-k", "-5"], ["top_k", "-5"]),
    "max_tokens 0": (["--token-ids", "1", "--max-tokens", "0"], ["max_tokens", "at least one"]),
    "min_tokens above max_tokens": (["--token-ids", "1", "-n", "2", "--min-tokens", "3"], ["min_tokens", "3"]),
    "repetition_penalty 0": (["--token-ids", "1", "--repetition-penalty", "0"], ["repetition_penalty"]),
    "seed negative": (["--token-ids", "1", "--seed", "-1"], ["seed", "-1"]),
    "stop empty": (["--token-ids", "1", "--stop", ""], ["stop"]),
    "stop without tokenizer": (["--token-ids", "1", "--stop", "x"], ["no tokenizer.json"]),
    "backend unknown": (["--token-ids", "1", "--backend", "abacus"], ["abacus", "reference"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument_of_generate(case, good, monkeypatch, capsys):
    arguments, fragments = ARGUMENTS[case]
    assert_refused(main(monkeypatch, capsys, "generate", good, *arguments), *fragments)


def test_bad_arguments_of_eval(tmp_path, monkeypatch, capsys):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latins").mkdir()
    shutil.copy(tmp_path / "latin", tmp_path / "latins" / "a.txt")
    for arguments, fragments in [
        ([tmp_path / "latin"], ["latin", "not UTF-8", "byte 0"]),
        ([tmp_path / "empty"], ["too short"]),
        ([tmp_path / "folder"], ["folder", ".txt"]),
        ([tmp_path / "nowhere"], ["nowhere", "leave it out"]),
        ([Path("/proc/self/mem")], ["/proc/self/mem cannot be read", "nput/output error"]),
        ([tmp_path / ("a" * 300)], ["aaa", "too long"]),
        ([tmp_path / "latins"], ["latins", "1 text files", "none is UTF-8", "a.txt"]),
        ([tmp_path / "short", "--window", "0"], ["window is 0", "1 to 2048"]),
        ([tmp_path / "short", "--window", "-3"], ["window is -3", "1 to 2048"]),
        ([tmp_path / "short", "--window", "4096"], ["window is 4096", "1 to 2048"]),
        ([tmp_path / "short", "--backend", "abacus"], ["abacus", "reference"]),
    ]:
        assert_refused(main(monkeypatch, capsys, "eval", "code-8m", *arguments), *fragments)
