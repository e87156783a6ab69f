"""The tree's shape: imports point down, no file is two ideas."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Floor of each module or package, by the longest prefix that matches; a module imports its own floor and those below.
FLOORS = {
    "baichuan": 0,
    "baichuan.errors": 0,
    "baichuan.config": 0,
    "baichuan.records": 0,
    "baichuan.position": 1,
    "baichuan.tokenizer": 1,
    "baichuan.chat": 1,
    "baichuan.comm": 1,
    "baichuan.manifest": 1,
    "baichuan.files": 1,
    "baichuan.progress": 1,
    "baichuan.processes": 1,
    "baichuan.hub_dataset": 1,
    "baichuan.texts": 1,
    "baichuan.checkpoint": 1,
    "baichuan.quant": 1,
    "baichuan.kernels": 1,
    "baichuan.ops": 2,
    "baichuan.model": 2,
    "baichuan.hf": 2,
    "baichuan.hf_config": 2,
    "baichuan.executors": 3,
    "baichuan.engine": 4,
    "baichuan.sampling": 4,
    "baichuan.beam": 4,
    "baichuan.session": 4,
    "baichuan.token_files": 4,
    "baichuan.calibrate": 4,
    "baichuan.convert": 4,
    "baichuan.builder": 4,
    "baichuan.runtime": 4,
    "baichuan.self_check": 4,
    "baichuan.evaluation": 5,
    "baichuan.conversation": 5,
    "baichuan.build_flags": 5,
    "baichuan.cli": 5,
    "weight": 6,
    "build": 7,
    "run": 7,
    "summarize": 7,
    "hf_baichuan_convert": 7,
}
MAX_LINES = 300
LONGER = {}  # file: why it is one idea all the same


def modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in [*ROOT.glob("*.py"), *ROOT.glob("baichuan/**/*.py")]
    }


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
    path.write_text("from baichuan.session import Session\nfrom baichuan import errors")
    assert list(upward("baichuan.position", path)) == ["baichuan.position imports baichuan.session"]


def test_every_module_has_a_floor_of_its_own():
    tops = {".".join(module.split(".")[:2]) for module in modules()}
    assert tops == set(FLOORS)


@pytest.mark.parametrize("module", modules())
def test_a_file_is_one_idea(module):
    path = modules()[module]
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES or path.name in LONGER


def test_nothing_runs_remote_code_or_unpickles_freely():
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                safe = {"weights_only": True, "allow_pickle": False}
                assert any(k.arg in safe and ast.literal_eval(k.value) == safe[k.arg] for k in node.keywords), path
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
