"""Why a test may be skipped on a complete CPU machine; pytest --only_named_skips fails on any other reason."""

import pytest

RELEASED_FOLDER = "BAICHUAN_TOKENIZERS"  # environment variable
NO_RELEASED_TOKENIZERS = f"{RELEASED_FOLDER} names no folder of released tokenizers"
NO_LM_EVAL = "lm_eval is not installed"
NO_INSTRUCTIONS = "needs a processor with "  # an instruction set's name follows
NAMED_SKIPS = {
    *(NO_INSTRUCTIONS + name for name in ("avx2", "avx_vnni", "avx512bw")),
    NO_LM_EVAL,
    NO_RELEASED_TOKENIZERS,
    "the interpreter cannot multiply bfloat16 matrices",
    "the interpreter cannot multiply e4m3 matrices",
    "PyTorch has no product of float16 to float32 on the CPU",
    "this user may not mount a tmpfs",
}
_others: list[str] = []  # this run's other skips: test and reason


def pytest_addoption(parser):
    parser.addoption("--only_named_skips", action="store_true", help="fail on a skip that named_skips.py lacks")


def note_skip(report):
    """A hook for reports of collection and of running."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in NAMED_SKIPS:
            _others.append(f"{report.nodeid}: {reason}")


pytest_collectreport = pytest_runtest_logreport = note_skip


def pytest_sessionfinish(session):
    if _others and session.config.getoption("only_named_skips"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if _others and config.getoption("only_named_skips"):
        terminalreporter.section("skips that tests/support/named_skips.py does not name", red=True)
        for each in _others:
            terminalreporter.write_line(each)
