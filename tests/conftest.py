"""Before any test is imported: GPUs are hidden from tests that need none, kernels then run in Triton's interpreter,
programs that tests start find the project where it is not installed, and tests of libraries that a GPU machine may lack
are left out there."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu_marks import asks_for_gpus
from named_skips import (  # noqa: F401
    NO_RELEASED_TOKENIZERS,
    RELEASED_FOLDER,
    pytest_addoption,
    pytest_collectreport,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
collect_ignore = [] if find_spec("datasets") and find_spec("rouge_score") else ["test_rouge.py"]
collect_ignore += [] if find_spec("peft") else ["test_lora.py"]
collect_ignore += [] if find_spec("pexpect") and find_spec("pyte") else ["test_chat_terminal.py"]


def pytest_configure(config):
    """`make test` is the same on every machine; `make test-cuda` asks for the tests that need a GPU."""
    if not asks_for_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import kernel_device  # noqa: F401  before any kernel, and after GPUs are hidden


def pytest_collection_modifyitems(items):
    if os.environ.get(RELEASED_FOLDER):
        return
    for item in items:
        if item.get_closest_marker("released_tokenizers"):
            item.add_marker(pytest.mark.skip(reason=NO_RELEASED_TOKENIZERS))


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    """An engine of v1_7b, for the tests of one file; a file may have a fixture of its own instead."""
    import scripts  # not before GPUs are hidden

    return scripts.built(tmp_path_factory.mktemp("engine"), "v1_7b")


@pytest.fixture
def prompts(tmp_path) -> Path:
    """A file with the ids of one of v1_7b's prompts."""
    import scripts

    return scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,))


@pytest.fixture(autouse=True)
def log_level():
    """A script's --log_level ends with its test."""
    yield
    logging.getLogger("baichuan").setLevel(logging.NOTSET)
