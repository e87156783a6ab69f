"""The tree's shape: imports point down, no file is two ideas."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Floor of each package or module, by the longest prefix that matches; a module imports its own floor and those below.
FLOORS = {
    "baichuan": 0,
    "baichuan.errors": 0,
    "baichuan.config": 0,
    "baichuan.records": 0,
    "baichuan.util": 1,
    "baichuan.parallel": 1,
    "baichuan.text": 1,
    "baichuan.kernels": 1,
    "baichuan.quant": 2,
    "baichuan.model": 2,
    "baichuan.weights": 3,
    "baichuan.hf_model": 4,
    "baichuan.executors": 4,
    "baichuan.generation": 5,
    "baichuan.engine": 6,
    "baichuan.api": 7,
    "baichuan.calibration": 7,
    "baichuan.evaluation": 7,
    "baichuan.cli": 8,
    "baichuan.doctor": 8,
    "weight": 8,
    "build": 9,
    "run": 9,
    "summarize": 9,
    "hf_baichuan_convert": 9,
}
MAX_LINES = 300
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
MAX_FUNCTION_LINES = 60


def modules(*patterns):
    """Path of each module, by default of those that are installed."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for pattern in patterns or ("*.py", "baichuan/**/*.py")
        for path in ROOT.glob(pattern)
    }


# Modules whose files and functions are held to a length.
SHORT = modules() | modules("benchmarks/*.py", "demo/*.py", "tests/**/*.py")


def floor(module):
    parts = module.split(".")
    return next(FLOORS[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOORS)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(module, path):
    own = modules()
    for name in imports(path):
        target = name if name in own else name.rpartition(".")[0]
        if target in own and floor(target) > floor(module):
            yield f"{module} imports {target}"


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    assert not list(upward(module, modules()[module]))


def test_an_upward_import_is_noticed(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from baichuan.generation.session import Session\nfrom baichuan import errors")
    expected = ["baichuan.model.position imports baichuan.generation.session"]
    assert list(upward("baichuan.model.position", path)) == expected


def test_every_module_has_a_floor_of_its_own():
    tops = {".".join(module.split(".")[:2]) for module in modules()}
    assert tops == set(FLOORS)


def test_the_architectures_table_is_this_one():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", ARCHITECTURE, re.MULTILINE)
    said = {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert said == {name.removeprefix("baichuan."): number for name, number in FLOORS.items() if name != "baichuan"}


def test_the_architecture_names_files_that_exist():
    paths = re.findall(r"[\w./]+\.py|(?<=`)[\w/]+/(?=`)", ARCHITECTURE)
    missing = [path for path in paths if not ((ROOT / path).exists() or (ROOT / "baichuan" / path).exists())]
    assert len(paths) > 20 and not missing


@pytest.mark.parametrize("path", SHORT.values(), ids=SHORT)
def test_a_file_is_one_idea(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def long_functions(text, limit):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= limit:
            yield node.name


@pytest.mark.parametrize("module", [name for name in SHORT if not name.startswith("baichuan.kernels.")])
def test_a_function_fits_a_screen(module):
    """Kernels are left out: what a program of the GPU does is one text."""
    assert not list(long_functions(SHORT[module].read_text("utf-8"), MAX_FUNCTION_LINES))


def test_a_long_function_is_noticed():
    body = "    pass\n" * MAX_FUNCTION_LINES
    text = f"def short():\n{body[9:]}\ndef long():\n{body}\nasync def awaited():\n{body}"
    assert list(long_functions(text, MAX_FUNCTION_LINES)) == ["long", "awaited"]


def test_nothing_runs_remote_code_or_unpickles_freely():
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                safe = {"weights_only": True, "allow_pickle": False}
                assert any(k.arg in safe and ast.literal_eval(k.value) == safe[k.arg] for k in node.keywords), path
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
