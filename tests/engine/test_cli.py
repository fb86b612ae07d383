"""The commands, as a person or a program meets them."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import hasten
from hasten import load
from hasten.backends.cpu import native_program
from hasten.checkpoint import bundled_directory, save
from hasten.cli.terminal import write
from hasten.model import Provenance
from hasten.program import Formats, lower
from hasten.spec import Spec
from tests.cli import ENVIRONMENT, ROOT, assert_refused, main, run, start
from tests.pure.test_checkpoint import tiny

PROMPT = "import json\n\n\ndef read_config(path):\n    "


@pytest.fixture
def hasten_main(monkeypatch, capsys):
    """Run a command inside this process; it must go well."""

    def command(*arguments, stdin=""):
        outcome = main(monkeypatch, capsys, *arguments, stdin=stdin)
        assert outcome.code == 0, outcome.err
        return outcome

    return command


# --- version, usage


def test_version():
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"hasten {hasten.__version__}\n", "")


def test_the_console_script_is_the_same_program():
    script = os.path.join(os.path.dirname(sys.executable), "hasten")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == f"hasten {hasten.__version__}\n"


@pytest.mark.parametrize("command", ["doctor", "inspect", "generate", "chat", "eval", "bench"])
def test_help_names_every_command(command, hasten_main):
    assert command in hasten_main("--help").out
    assert "Usage" in hasten_main(command, "--help").out


# --- inspect


def test_inspect_prints_a_table(hasten_main):
    out = hasten_main("inspect", "code-8m").out
    for fact in ("code-8m", "llama", "8,392,960 parameters", "16,785,920 bytes", "bfloat16", "vocabulary 8,192", "8 × Attention"):
        assert fact in out
    shares = [float(share) for share in re.findall(r"([\d.]+)%", out)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_inspect_json(hasten_main):
    facts = json.loads(hasten_main("inspect", "code-8m", "--json").out)
    assert facts["parameters"] == 8_392_960
    assert facts["bytes"] == 2 * facts["parameters"]
    assert sum(part["parameters"] for part in facts["parts"].values()) == facts["parameters"]
    assert sum(part["bytes"] for part in facts["parts"].values()) == facts["bytes"]
    assert facts["blocks"][0]["count"] == 8
    assert facts["cache_bytes_per_token"] == 8 * 2 * 2 * 64 * 2  # blocks · keys and values · heads · features · bytes
    assert facts["state_bytes_per_sequence"] == 0
    assert facts["formats"] == ["bfloat16"]
    assert facts["tokenizer"] is True


def test_inspect_program_names_the_ops(hasten_main):
    out = hasten_main("inspect", "code-8m", "--program").out
    assert out == lower(load("code-8m").spec, cache="bfloat16").text()
    for part in ("blocks.7.mixer.q", "rotate", "attend", "linear", "logits"):
        assert part in out.lower()


def test_inspect_fused_shows_what_was_joined(hasten_main, monkeypatch, capsys):
    out = hasten_main("inspect", "code-8m", "--fused", "--weights", "int8").out
    assert out == native_program(load("code-8m").spec, formats=Formats("int8")).text()
    assert "= Products(" in out
    assert "= RowChain(" in out
    assert "weight_format=int8" in out
    assert "weight_format" not in hasten_main("inspect", "code-8m", "--fused").out
    assert_refused(main(monkeypatch, capsys, "inspect", "code-8m", "--weights", "int8"), "--fused")
    assert_refused(main(monkeypatch, capsys, "inspect", "code-8m", "--fused", "--weights", "int5"), "int5", "int8")


def test_inspect_spec_round_trips(hasten_main):
    assert Spec.from_json(hasten_main("inspect", "code-8m", "--spec").out) == load("code-8m").spec


def test_inspect_load_reads_every_weight(hasten_main):
    facts = json.loads(hasten_main("inspect", "code-8m", "--load", "--json").out)
    assert facts["loaded_tensors"] == len(load("code-8m").weights)
    assert "weights in memory" in hasten_main("inspect", "code-8m", "--load").out


def test_inspect_shows_a_name_as_it_is(hasten_main, tmp_path):
    directory = tmp_path / "[red]" / "[/bold]"
    save(tiny(), directory)
    assert str(directory) in hasten_main("inspect", directory).out


def test_inspect_spells_out_what_a_terminal_would_obey(hasten_main, tmp_path):
    evil = "\x1b]0;owned\x07\x9b2J\u202e\n[red]"
    step = Provenance(evil, {evil: evil}, {"loss": [evil]})
    save(dataclasses.replace(tiny(), provenance=(step,)), tmp_path / "\x1b[2J")
    out = hasten_main("inspect", tmp_path / "\x1b[2J").out
    assert "made by \\x1b]0;owned\\x07\\x9b2J\\u202e\\n[red] {" in out
    assert all(line.isprintable() for line in out.splitlines())
    facts = json.loads(hasten_main("inspect", tmp_path / "\x1b[2J", "--json").out)
    assert facts["provenance"][0]["settings"] == {evil: evil}  # a program gets it as it is


def test_generated_text_is_spelt_out_for_a_terminal_only(monkeypatch, capsys):
    text = "a\tb\n\x1b[2J\r\x9b é\u202e"
    write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write(text)
    assert capsys.readouterr().out == "a\tb\n\\x1b[2J\\r\\x9b é\\u202e"


@pytest.mark.parametrize("extra", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "dumb", "COLUMNS": "20"}, {"FORCE_COLOR": "1"}], ids=str)
def test_terminals_of_every_kind(extra):
    done = run("inspect", "code-8m", env=extra)
    assert done.code == 0, done.err
    assert ("\x1b[" in done.out) == ("FORCE_COLOR" in extra)
    assert "8,392,960" in re.sub(r"\x1b\[[\d;]*m", "", done.out)


def test_a_terminal_that_knows_only_ascii():
    done = run("generate", "code-8m", "-p", "# größer", "-n", "3", "--echo", env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert done.out.startswith("# gr??er")
    done = run("inspect", "code-8m", env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert "8 ? Attention" in done.out


# --- generate


def test_generate_streams_what_json_says(hasten_main):
    streamed = hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "24").out
    said = json.loads(hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "24", "--json").out)
    assert streamed == said["text"] + "\n"
    assert len(said["token_ids"]) == 24
    assert said["finish_reason"] == "length"
    assert said["prompt"] == PROMPT
    tokenizer = load("code-8m").text_tokenizer()
    assert said["prompt_token_ids"] == tokenizer.encode(PROMPT)
    assert said["tokens_per_s"] == pytest.approx(24 / said["seconds"])


def test_generate_echo(hasten_main):
    plain = hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "8").out
    assert hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "8", "--echo").out == PROMPT + plain


def test_generate_reads_standard_input():
    plain = run("generate", "code-8m", "-p", PROMPT, "-n", "8")
    piped = run("generate", "code-8m", "-p", "-", "-n", "8", stdin=PROMPT)
    assert (piped.code, piped.out) == (0, plain.out)
    assert piped.err == ""


def test_generate_seed_repeats(hasten_main):
    first, second, other = (
        hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "16", "-t", "1", "--seed", seed).out for seed in (5, 5, 6)
    )
    assert first == second != other


def test_generate_token_ids(hasten_main):
    ids = ",".join(map(str, load("code-8m").text_tokenizer().encode(PROMPT)))
    given = hasten_main("generate", "code-8m", "--token-ids", ids, "-n", "8").out
    assert given == hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "8").out


def test_generate_without_tokenizer_prints_ids(hasten_main, tmp_path):
    save(tiny(), tmp_path / "model")
    out = hasten_main("generate", tmp_path / "model", "--token-ids", "3, 14,15", "-n", "4").out
    said = json.loads(hasten_main("generate", tmp_path / "model", "--token-ids", "3,14,15", "-n", "4", "--json").out)
    assert out.split() == [str(token) for token in said["token_ids"]]
    assert said["text"] == ""


def test_generate_stop(hasten_main):
    free = hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "24").out
    stop = free[10:12]
    said = json.loads(hasten_main("generate", "code-8m", "-p", PROMPT, "-n", "24", "--stop", stop, "--stop", "\0", "--json").out)
    assert said["text"] == free[: free.index(stop)]
    assert said["finish_reason"] == "stop"


def test_generate_empty_prompt(hasten_main):
    assert json.loads(hasten_main("generate", "code-8m", "-p", "", "-n", "2", "--json").out)["prompt_token_ids"] == [0]


# --- chat


def test_chat_with_a_pipe():
    done = run("chat", "code-8m", "-n", "8", "-t", "0", stdin="def f(x):\n\n/clear\ndef f(x):\n/exit\nnever\n")
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1
    assert "no chat template" in done.err
    # the same question after /clear has the same answer, since nothing before it counts
    half = len(done.out) // 2
    assert done.out[:half] == done.out[half:]
    assert done.out.strip()
    assert "never" not in done.out


def test_chat_remembers(monkeypatch, capsys):
    def answers(stdin):
        return main(monkeypatch, capsys, "chat", "code-8m", "-n", "8", "-t", "0", stdin=stdin).out

    one, two = answers("x = 1\n"), answers("y = 2\nx = 1\n")
    assert not two.endswith(one)


def test_chat_does_not_begin_where_its_backend_is_not(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = main(monkeypatch, capsys, "chat", "code-8m", "--backend", "cuda", stdin="hello\n")
    assert done.code == 2
    assert "cuda" in done.err
    assert not done.out


def test_chat_ends_with_its_input(hasten_main):
    assert hasten_main("chat", "code-8m", stdin="").out == "\n"


def test_chat_says_that_it_is_full_and_goes_on(hasten_main):
    done = hasten_main("chat", "code-8m", "-n", "2", "-t", "0", stdin="x " * 3000 + "\nhello\n")
    assert "at most 2047" in done.err
    assert "/clear" in done.err
    assert done.out.strip()


# --- eval


def reference_scores(text, window, limit=None):
    """Loss and top-1 of the bundled model by transformers, over windows cut in the same way."""
    directory = bundled_directory("code-8m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nll, correct, count = 0.0, 0, 0
    for begin in range(0, len(ids) - 1, window):
        piece = ids[begin : begin + window + 1]
        if limit is not None:
            piece = piece[: limit - count + 1]
        if len(piece) < 2:
            break
        with torch.no_grad():
            logits = model(torch.tensor([piece[:-1]])).logits[0].double()
        targets = torch.tensor(piece[1:])
        nll += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
    return nll / count, correct / count, count


@pytest.mark.parametrize(("window", "limit"), [(64, None), (512, None), (50, 130)])
def test_eval_equals_transformers(window, limit, hasten_main, tmp_path):
    text = (ROOT / "src/hasten/engine/request.py").read_text()[:2500] + "# größer 漢字\n"
    (tmp_path / "text.py").write_text(text)
    limited = [] if limit is None else ["--limit", limit]
    facts = json.loads(
        hasten_main("eval", "code-8m", tmp_path / "text.py", "--window", window, *limited, "--backend", "reference", "--json").out
    )
    loss, top1, tokens = reference_scores(text, window, limit)
    assert facts["tokens"] == tokens
    assert facts["loss"] == pytest.approx(loss, abs=1e-5)
    assert facts["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert facts["top1"] == pytest.approx(top1, abs=1e-9)
    assert facts["window"] == window
    assert "card_loss" not in facts


def test_eval_prints_for_people(hasten_main, tmp_path):
    (tmp_path / "a.py").write_text("import os\n" * 20)
    (tmp_path / "b.txt").write_text("import sys\n" * 20)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    done = hasten_main("eval", "code-8m", tmp_path)
    assert re.search(r"2 documents, [\d,]+ tokens, windows of 512", done.out)
    assert re.search(r"loss \d\.\d{4} nats   perplexity [\d.]+   top-1 0\.\d{4}", done.out)
    assert done.err == ""


def test_eval_of_a_folder_passes_over_what_is_no_text(hasten_main, tmp_path):
    (tmp_path / "a.py").write_text("import os\n" * 20)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("import sys\n" * 20)
    clean = json.loads(hasten_main("eval", "code-8m", tmp_path, "--json").out)
    assert (clean["documents"], clean["skipped"]) == (2, 0)
    for folder in (".git", ".venv/lib", "node_modules/x", "sub/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "c.py").write_text("import os\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "sub" / "wide.md").write_bytes(b"\xff\xfea\0")
    facts = json.loads(hasten_main("eval", "code-8m", tmp_path, "--json").out)
    assert (facts["documents"], facts["skipped"]) == (2, 2)
    assert (facts["sha256"], facts["loss"]) == (clean["sha256"], clean["loss"])
    assert "2 files skipped that are not UTF-8" in hasten_main("eval", "code-8m", tmp_path).out
    assert json.loads(hasten_main("eval", "code-8m", tmp_path / ".git", "--json").out)["documents"] == 1  # asked for by name


# --- doctor


def test_doctor_json(hasten_main):
    facts = json.loads(hasten_main("doctor", "--no-measure", "--json").out)
    assert facts["cpu"]["cores"] >= 1
    assert facts["memory"]["total"] > 0
    assert facts["backends"]["reference"].startswith("torch")
    assert "NVIDIA" in facts["backends"]["cuda"] or "hasten[cuda]" in facts["backends"]["cuda"]
    assert "roofline" not in facts


def test_doctor_prints(hasten_main):
    out = hasten_main("doctor", "--no-measure").out
    for part in ("cpu", "isa", "memory", "backend"):
        assert re.search(rf"^{part} ", out, re.MULTILINE)


# --- interrupted


def first_byte(process):
    byte = process.stdout.read(1)
    assert byte, process.stderr.read().decode()
    return byte


def test_ctrl_c_during_generate():
    process = start("generate", "code-8m", "-p", PROMPT, "-n", "2000", "--ignore-eos")
    first_byte(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.decode().strip() in {"", "Aborted!"}


def test_ctrl_c_while_loading():
    process = start("generate", "code-8m", "-p", PROMPT, "-n", "2000", "--ignore-eos")
    time.sleep(1.5)  # the command runs, and imports
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["generate", "code-8m", "-p", PROMPT, "-n", "200", "--ignore-eos"], ["inspect", "code-8m", "--program"], ["inspect", "code-8m"]],
    ids=["generate", "program", "table"],
)
def test_a_reader_that_goes_away(arguments):
    process = start(*arguments)
    if arguments[0] == "generate":
        first_byte(process)
    process.stdout.close()
    process.stdin.close()
    process.wait(timeout=60)
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.returncode == 1
    assert err == ""


def test_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hasten.cli", "inspect", "code-8m", "--json"], stdout=full, stderr=subprocess.PIPE, text=True,
            env=ENVIRONMENT, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "hasten: the output cannot be written: No space left on device; make room\n"


def test_without_torch_the_line_names_the_extra(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    hidden = {"PYTHONPATH": str(tmp_path)}
    assert_refused(run("generate", "code-8m", "-p", "x", "--backend", "reference", env=hidden), "hasten[torch]")
    assert run("generate", "code-8m", "-p", "x", "-n", "2", env=hidden).code == 0
    assert run("inspect", "code-8m", env=hidden).code == 0


def test_importing_the_command_line_is_quick():
    program = "import sys, hasten.cli; print([name for name in ('torch', 'numpy', 'tokenizers', 'huggingface_hub') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"


# --- the cache's format


def test_the_cache_of_a_command(hasten_main, monkeypatch, capsys):
    facts = json.loads(hasten_main("inspect", "code-8m", "--cache", "int8", "--json").out)
    assert (facts["cache"], facts["cache_bytes_per_token"]) == ("int8", 8 * 2 * 2 * (64 + 2))
    assert "cache 2,112 bytes a token (fp8)" in hasten_main("inspect", "code-8m", "--cache", "fp8").out
    losses = {}
    for cache in ("bf16", "int8", "fp8"):
        facts = json.loads(hasten_main("eval", "code-8m", "--limit", "400", "--cache", cache, "--json").out)
        assert facts["cache"] == cache
        losses[cache] = facts["loss"]
    assert len(set(losses.values())) == 3
    out = hasten_main("generate", "code-8m", "-p", "import os\n", "-n", "5", "--cache", "int8", "--json").out
    assert len(json.loads(out)["token_ids"]) == 5
    for command in (("generate", "-p", "x"), ("chat",), ("eval",), ("inspect",)):
        refused = main(monkeypatch, capsys, command[0], "code-8m", *command[1:], "--cache", "q4")
        assert refused.code == 2
        assert "cache 'q4' is not supported; accepted are bf16, int8, fp8" in refused.err
