"""The project's rules as tests. Every rule that looks for something is shown to find it in a planted case."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.families.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
MODULES = sorted((SRC / "hasten").rglob("*.py"))
BIN = Path(sys.executable).parent

TORCH_HOMES = ("hasten/backends/reference", "hasten/backends/cuda", "hasten/distributed", "hasten/train", "hasten/compress")
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "jinja2", "ml_dtypes")
SECONDS_OVER_BARE = 0.4

# Functions that take **names, and why: everywhere else a parameter is written down.
TAKES_ANY_NAMES = {
    ("hasten/cli/options.py", "spread_command"): "typer calls it with what its signature has, which is made of groups of options",
    ("hasten/engine/chat.py", "call"): "jinja2 calls it for every call a template makes",
    ("hasten/engine/chat.py", "measured"): "stands in for a function of a template, whatever its parameters",
    ("hasten/engine/chat.py", "__init__"): "stands in for jinja2's namespace(), whose names the template chooses",
    ("hasten/program/lower.py", "split"): "its names are the pieces' names, data and not options",
    ("hasten/program/lower.py", "head_split"): "its names are the pieces' names, data and not options",
}


def run(*command: object, cwd: Path = ROOT, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", **settings.pop("env", {})}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment, check=False, **settings
    )


def python(code: str, *flags: str, **settings) -> subprocess.CompletedProcess:
    return run(sys.executable, *flags, "-c", textwrap.dedent(code), **settings)


def name_of(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def tracked() -> list[Path]:
    listed = run("git", "ls-files", "-z")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# --- imports go down


def lint_imports(directory: Path) -> subprocess.CompletedProcess:
    """lint-imports on the package under ``directory``/src: -S leaves out .pth files, and with them the editable install."""
    path = os.pathsep.join([str(directory / "src"), sysconfig.get_paths()["purelib"]])
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    return python(code, "-S", cwd=directory, env={"PYTHONPATH": path})


def test_imports_go_down_the_floors():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "Contracts: 1 kept, 0 broken." in result.stdout
    assert run(BIN / "lint-imports").returncode == 0  # as people run it


@pytest.mark.parametrize(
    ("where", "planted", "said"),
    [
        ("base/planted.py", "from hasten.engine import request", "hasten.base is not allowed to import hasten.engine"),
        ("spec/planted.py", "def late():\n    import hasten.formats.weights", "hasten.spec is not allowed to import hasten.formats"),
        (
            "formats/planted.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hasten.model import Model",
            "hasten.formats is not allowed to import hasten.model",
        ),
        ("program/planted.py", "from hasten.families import all_families", "hasten.program is not allowed to import hasten.families"),
        ("families/planted.py", "import hasten.program.ops", "hasten.families is not allowed to import hasten.program"),
        ("shelf/__init__.py", "x = 1", "shelf"),
    ],
)
def test_an_import_upwards_is_found(tmp_path, where, planted, said):
    shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "src" / "hasten" / where
    file.parent.mkdir(exist_ok=True)
    file.write_text(planted + "\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    assert said in " ".join(result.stdout.split())


def names_from_the_root(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a module takes from ``hasten`` itself, which the layers contract does not see."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hasten" and not node.level:
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, "import hasten") for alias in node.names if alias.name == "hasten")


def test_from_the_root_come_only_the_version_and_the_native_code():
    for path in MODULES:
        for line, name in names_from_the_root(ast.parse(path.read_text())):
            assert name in {"_native", "__version__"}, f"{name_of(path)}:{line} takes {name} from hasten; import it from its own floor"
    assert list(names_from_the_root(ast.parse("from hasten import LLM\nimport hasten"))) == [(1, "LLM"), (2, "import hasten")]


def torch_imports(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = any(alias.name.split(".")[0] == "torch" for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                found = module.split(".")[0] == "torch"
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found = name.split(".")[0] == "torch"
            case _:
                found = False
        if found:
            yield node.lineno


def test_torch_is_imported_only_where_it_may_be():
    homes = 0
    for path in MODULES:
        lines = list(torch_imports(ast.parse(path.read_text())))
        at_home = name_of(path).startswith(TORCH_HOMES)
        homes += at_home and bool(lines)
        assert at_home or not lines, f"{name_of(path)}:{lines} imports torch; it may be imported in {', '.join(TORCH_HOMES)}"
    assert homes, "no module imports torch: this test looks in the wrong place"


@pytest.mark.parametrize(
    "planted",
    [
        "import torch",
        "import os, torch as t",
        "import torch.nn.functional as F",
        "from torch import Tensor",
        "from torch.nn import functional",
        "def late():\n    import torch",
        "if TYPE_CHECKING:\n    from torch import Tensor",
        "importlib.import_module('torch.nn')",
        "__import__('torch')",
    ],
)
def test_any_import_of_torch_is_found(planted):
    assert list(torch_imports(ast.parse(planted)))
    assert not list(torch_imports(ast.parse("import torchless\nfrom .torch import x\nfrom hasten.torch import y")))


# tests/pure: what needs no torch and no native code, so neither may be imported there, nor a test helper that may import them

NOT_PURE = ("torch", "transformers", "hasten._native", "hasten.backends.reference", "hasten.backends.cpu")
PURE_HELPERS = ("tests.pure", "tests.cli")


def impure_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [f"{module}.{alias.name}" for alias in names]
            case ast.Call(
                func=ast.Attribute(attr="import_module" | "importorskip") | ast.Name(id="import_module" | "importorskip" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found = [name]
            case _:
                found = []
        for name in found:
            helper = name.startswith("tests.") and not f"{name}.".startswith(tuple(f"{pure}." for pure in PURE_HELPERS))
            if helper or f"{name}.".startswith(tuple(f"{heavy}." for heavy in NOT_PURE)):
                yield node.lineno, name


def test_pure_tests_are_pure():
    found = [
        f"{path.name}:{line}: {name}"
        for path in sorted((ROOT / "tests" / "pure").rglob("*.py"))
        for line, name in impure_imports(ast.parse(path.read_text()))
    ]
    assert not found
    assert any(list(impure_imports(ast.parse(path.read_text()))) for path in (ROOT / "tests" / "ops").glob("*.py"))


@pytest.mark.parametrize(
    "planted",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch import Tensor",
        "def late():\n    from transformers import AutoModel",
        'pytest.importorskip("transformers.utils.hub")',
        "from hasten import _native",
        "from hasten._native import cpu_features",
        "from hasten.backends import reference",
        "from hasten.backends.reference import play",
        "from tests.ops.naive import NAIVE",
        "from tests.families import oracles",
    ],
)
def test_an_impure_import_is_found(planted):
    assert list(impure_imports(ast.parse(planted)))
    assert not list(impure_imports(ast.parse("import torchless, hasten\nfrom tests.cli import run\nfrom tests.pure import specs")))


# --- imports are light


def test_every_module_outside_torchs_homes_imports_without_torch():
    names = [
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if not name_of(path).startswith(TORCH_HOMES) and path.name != "__main__.py"
    ]
    result = python(
        f"""
        import importlib, sys
        sys.modules["torch"] = None  # as if it were not installed
        for name in {names!r}:
            importlib.import_module(name)
        """
    )
    assert result.returncode == 0, result.stderr


IMPORT = "import hasten"
HELP = """
import sys
sys.argv = ["hasten", "--help"]
from hasten.cli import main
try:
    main()
except SystemExit as stop:
    if stop.code:
        raise
"""


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_starting_leaves_what_is_heavy_alone(code):
    result = python(f"{code}\nimport sys\nprint('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "loaded: ['numpy']" in python(f"import numpy, sys\nprint('loaded:', sorted(set({HEAVY!r}) & set(sys.modules)))").stdout


def seconds(code: str) -> float:
    """Of the processor, which is as long as it takes where nothing else runs."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(code, env={"PYTHONDONTWRITEBYTECODE": ""}).returncode == 0
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


@pytest.mark.timed
@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_starting_is_quick(code):
    seconds(code)  # the first may compile bytecode
    pairs = [(seconds(code), seconds("pass")) for _ in range(5)]
    over = min(ours for ours, _ in pairs) - min(bare for _, bare in pairs)  # whatever else the machine does comes on top
    assert over <= SECONDS_OVER_BARE, f"{over:.2f} s over a bare interpreter"


def test_the_console_script_helps():
    result = run(BIN / "hasten", "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


# --- linters


def test_ruff_finds_nothing():
    result = run(BIN / "ruff", "check", ".")
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize(
    ("planted", "rule"),
    [
        ('name = "x"\nprint("hello {name}")\n', "RUF027"),
        ("def answer(x):\n    return x\n", "ANN001"),
        ("assert 1\n", "S101"),
        ("x = 1  # noqa: E501\n", "RUF100"),
    ],
)
def test_ruff_has_its_rules_on(planted, rule):
    result = run(BIN / "ruff", "check", "--output-format", "json", "--stdin-filename", SRC / "hasten" / "planted.py", "-", input=planted)
    assert result.returncode == 1
    assert rule in {finding["code"] for finding in json.loads(result.stdout)}


def test_mypy_finds_nothing():
    result = run(BIN / "mypy")
    assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"no issues found in \d\d+ source files", result.stdout)


def test_mypy_is_strict(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def answer(x):\n    return x\n")
    result = run(BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", planted)
    assert result.returncode == 1
    assert "no-untyped-def" in result.stdout


# --- what no module may say

Found = Iterator[tuple[int, str]]


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports_that_run_code(tree: ast.AST) -> Found:
    """Formats that run code when read."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "shelve", "marshal", "cloudpickle", "joblib"}
    for node in ast.walk(tree):
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from ((node.lineno, module) for module in modules if module.split(".")[0] in banned)


def loads_that_run_code(tree: ast.AST) -> Found:
    for call in calls(tree):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "load" and ast.unparse(call.func.value) == "torch":
            yield call.lineno, "torch.load"
        yield from ((call.lineno, k.arg) for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False")


def code_from_text(tree: ast.AST) -> Found:
    for call in calls(tree):
        if ast.unparse(call.func) in {"eval", "exec", "builtins.eval", "builtins.exec"}:
            yield call.lineno, ast.unparse(call.func)


def asserts(tree: ast.AST) -> Found:
    """Gone under -O: a check that matters raises."""
    yield from ((node.lineno, "assert") for node in ast.walk(tree) if isinstance(node, ast.Assert))


def shells(tree: ast.AST) -> Found:
    for call in calls(tree):
        if ast.unparse(call.func) in {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}:
            yield call.lineno, ast.unparse(call.func)
        yield from ((call.lineno, "shell=") for k in call.keywords if k.arg == "shell" and ast.unparse(k.value) != "False")


def remote_code(tree: ast.AST) -> Found:
    word = "trust_remote_code"
    for node in ast.walk(tree):
        said = {getattr(node, field, None) for field in ("arg", "id", "attr", "name")} | (
            {node.value} if isinstance(node, ast.Constant) else set()
        )
        if word in said:
            yield getattr(node, "lineno", 0), word


def any_names(tree: ast.AST) -> Found:
    """**names in a signature: a tunnel that a misspelt option falls into."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg is not None:
            yield node.lineno, getattr(node, "name", "lambda")


def mutable_globals(tree: ast.Module) -> Found:
    """Lists, dicts and sets at module level under a variable's name: state that outlives who made it."""
    makers = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "bytearray"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node not in level_of(tree):
            continue
        value = node.value
        made = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp) or (
            isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1].split("[")[0] in makers
        )
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if made and isinstance(target, ast.Name) and target.id != "__all__" and target.id != target.id.upper():
                yield node.lineno, target.id


def level_of(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported, those under if, try and with included."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        found.append(node)
        for field in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                todo.extend(getattr(node, field, []))
    return found


def rebound_globals(tree: ast.AST) -> Found:
    yield from ((node.lineno, f"global {', '.join(node.names)}") for node in ast.walk(tree) if isinstance(node, ast.Global))


BANS = {
    imports_that_run_code: [
        "import pickle",
        "from dill import load",
        "import os, shelve",
        "def f():\n    import marshal",
        "from pickle import *",
    ],
    loads_that_run_code: ["torch.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=x)"],
    code_from_text: ["eval('1')", "exec(text)", "builtins.exec(text)"],
    asserts: ["assert x", "def f():\n    assert x, 'y'"],
    shells: ["os.system('ls')", "subprocess.run('ls', shell=True)", "Popen(x, shell=flag)", "os.popen('ls')"],
    remote_code: [
        "load(x, trust_remote_code=True)",
        "def f(trust_remote_code): ...",
        "settings = {'trust_remote_code': True}",
        "x.trust_remote_code = 1",
    ],
    any_names: ["def f(**kwargs): ...", "async def f(*, a, **rest): ...", "f = lambda **k: k", "class A:\n    def m(self, **kwargs): ..."],
    mutable_globals: [
        "cache = {}",
        "seen: set[str] = set()",
        "_known = [1]",
        "if x:\n    table = dict(a=1)",
        "d = collections.defaultdict(list)",
    ],
    rebound_globals: ["def f():\n    global x\n    x = 1"],
}
FINE = """
import torchless
model.eval()
CACHE = {}
__all__ = ["f"]
_NAMES: dict[str, int] = {}
pair = (1, 2)
def f(a, *rest, b=None):
    local = {}
    subprocess.run(["ls"], shell=False)
    return json.load(a)
class C:
    field: list[int] = []
"""


@pytest.mark.row("pickles on sockets", "no import")
@pytest.mark.row("remote code", "no switch", "no assert")
@pytest.mark.row("eval", "none in the source")
@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban.__name__)
def test_no_module_says(ban):
    found = []
    for path in MODULES:
        for line, what in ban(ast.parse(path.read_text())):
            if ban is any_names and (name_of(path), what) in TAKES_ANY_NAMES:
                continue
            found.append(f"{name_of(path)}:{line}: {what}")
    assert not found


@pytest.mark.parametrize(("ban", "planted"), [(ban, text) for ban, texts in BANS.items() for text in texts])
def test_what_is_banned_is_found(ban, planted):
    assert list(ban(ast.parse(planted)))


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban.__name__)
def test_what_is_fine_is_not_found(ban):
    assert not list(ban(ast.parse(FINE)))


def test_the_list_of_exceptions_holds_nothing_that_is_gone():
    there = {(name_of(path), what) for path in MODULES for _, what in any_names(ast.parse(path.read_text()))}
    assert set(TAKES_ANY_NAMES) <= there


# --- what is counted


def test_the_counts_of_families_are_right():
    for name in ("README.md", "docs/log.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        for counted in re.findall(r"(\d+)\s+(?:decoder\s+)?families", (ROOT / name).read_text()):
            assert int(counted) == len(BUILT_IN), f"{name} says {counted} families"
    assert re.search(rf"\b{len(BUILT_IN)} decoder families", (ROOT / "README.md").read_text())


def test_the_lists_of_families_are_whole():
    table = re.search(r"## What it reads\n(.*?)\n\n[^|]", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = [row.split("|")[2] for row in table[1].splitlines() if row.startswith("|")][2:]
    read_me = re.sub(r"\([^)]*\)", "", ",".join(rows))
    changes = re.search(r"- Families: (.*?);", (ROOT / "CHANGELOG.md").read_text(), re.DOTALL)
    for listed in (read_me, changes[1]):
        assert sorted(name.strip() for name in listed.split(",")) == sorted(BUILT_IN)


# --- what no file may hold

MACHINE_PATHS = re.compile(rb"(?<![\w.~/-])/(?:work|root|home)(?:/\w|\b(?![\w/-]))")
REGISTRIES = re.compile(
    rb"(?:pypi|test\.pypi|npmjs|pythonhosted|crates|conda\.anaconda|ghcr|docker|quay|proxy\.golang)\.(?:org|io|com)\b|--(?:extra-)?index-url|download\.pytorch",
    re.IGNORECASE,
)


def lines_with(pattern: re.Pattern[bytes], files: list[Path]) -> list[str]:
    found = []
    for path in files:
        data = path.read_bytes()
        if b"\0" not in data[:4096] and path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(data.splitlines(), 1) if pattern.search(line)]
    return found


def test_no_file_names_a_place_on_somebodys_machine():
    files = [path for path in tracked() if not path.is_relative_to(ROOT / "docs")]
    assert not lines_with(MACHINE_PATHS, files)
    for planted in (b'open("/home/ann/x")', b"cd /work/main", b"PATH=/root/bin", b"a: /work"):
        assert MACHINE_PATHS.search(planted)
    for fine in (b"https://x.org/home/page", b"src/work/x", b"~/home/x", b"/homes", b"/proc/cpuinfo"):
        assert not MACHINE_PATHS.search(fine)


def test_no_file_names_a_package_registry():
    assert not lines_with(REGISTRIES, [path for path in tracked() if not path.is_relative_to(ROOT / "docs")])
    for planted in (b"https://pypi.org/simple", b"pip install --index-url x", b"https://download.pytorch.org/whl/cpu", b"ghcr.io/x"):
        assert REGISTRIES.search(planted)
    assert not REGISTRIES.search(b"pip install hasten")
