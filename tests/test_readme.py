"""README.md does what it says: its commands run in order, and its flags and targets exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from demo_checkpoint import demo_checkpoint

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.engine.folder import read_engine

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "baichuan-inc/Baichuan-13B-Chat"
SCRIPTS = {f"{script.__name__}.py": script.main for script in (build, run, summarize, hf_baichuan_convert)}
# What keeps a command short; argparse takes the last value that is given.
SHORTER = {
    "run.py": ["--max_output_len", "5"],
    "summarize.py": ["--max_ite", "2", "--output_len", "4"],
    "hf_baichuan_convert.py": ["--calib_max_length", "64"],
}
EXPECTED_SCRIPTS = {"build.py": 10, "hf_baichuan_convert.py": 2, "run.py": 6, "summarize.py": 3}  # at least


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the bash blocks, in order, as words."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def script_of(words: list[str]) -> str:
    return words[words.index("python") + 1]


def flags_of(words: list[str]) -> list[str]:
    return words[words.index("python") + 2 :]


def here(words: list[str], folder: Path, checkpoint: Path) -> list[str]:
    """The command on the small checkpoint, with ./tmp/ in `folder`."""
    shorter = SHORTER.get(script_of(words), [])
    return [word.replace(HUB_ID, str(checkpoint)).replace("./tmp/", f"{folder}/") for word in words] + shorter


def execute(words: list[str], capsys) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; without mpirun in this process."""
    if words[0] == "python":
        try:
            code = SCRIPTS[script_of(words)](flags_of(words))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    assert words[0] == "mpirun", f"the README starts {words[0]}, which this test does not know"
    words = [sys.executable if word == "python" else word for word in words[1:]]
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(mpirun, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return demo_checkpoint("v1_13b", 3)


@pytest.mark.timeout(300)
def test_every_command_runs(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    seen = dict.fromkeys(EXPECTED_SCRIPTS, 0)
    for words in commands():
        script = script_of(words)
        seen[script] += 1
        shown = shlex.join(words)
        given = here(words, tmp_path, checkpoint)
        code, out, err = execute(given, capsys)
        assert code == 0, f"{shown}\n{err}"
        if script == "build.py":
            engine = read_engine(Path(given[given.index("--output_dir") + 1]))
            for rank in range(engine.build.world_size):
                assert engine.rank_file(rank).stat().st_size > 1 << 20, shown
            assert "self-check against the float32 weights: mean KL" in err, shown
        elif script == "run.py":
            assert out.count('Output: "') == 1 and out.rstrip().endswith('"'), f"{shown}\n{out}"
        elif script == "summarize.py":
            assert out.count("Summary (engine, float16") == 1 and "ROUGE-1" in out, f"{shown}\n{out}"
        else:
            folder = Path(given[given.index("-o") + 1])
            assert (folder / "1-gpu" / "config.ini").is_file(), shown
    assert all(seen[script] >= least for script, least in EXPECTED_SCRIPTS.items()), seen


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        (lambda words: [*words, "--dtyp", "float16"], 2, "unrecognized arguments: --dtyp float16"),
        (lambda words: [*words, "--world_size", "3"], 2, "num_heads 10 is not divisible by"),
        (lambda words: [*words, "--model_version", "v2_7b"], 2, "contradicts"),
    ],
)
def test_a_wrong_command_fails(checkpoint, tmp_path, monkeypatch, capsys, change, code, sentence):
    """The negative control: execute() reports a command that does not do what it says."""
    monkeypatch.chdir(ROOT)
    words = change(here(commands()[0], tmp_path, checkpoint))
    got, _, err = execute(words, capsys)
    assert got == code and sentence in err, err
    assert not list(tmp_path.rglob("*.engine"))


@pytest.fixture(scope="module")
def known_flags() -> dict[str, set[str]]:
    """Each script's flags, by its --help."""
    found = {}
    for name in SCRIPTS:
        done = subprocess.run(
            [sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, env={**os.environ}
        )
        assert done.returncode == 0
        found[name] = set(re.findall(r"(?<![\w-])--?[a-zA-Z]\w*(?:-\w+)*", done.stdout))
    return found


def test_every_flag_exists(known_flags):
    for words in commands():
        for word in flags_of(words):
            if re.match(r"--?[a-zA-Z]", word):
                assert word in known_flags[script_of(words)], f"{script_of(words)} has no {word}"
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    mentioned = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<!\S)--?[a-z]\w*", code)}
    assert {"--per_channel", "--calib_dataset", "-sq", "--fp8_kv_cache"} <= mentioned
    assert not mentioned - set.union(*known_flags.values())
    assert "--use_weight_only" in known_flags["build.py"] and "--use_weight_only" not in known_flags["run.py"]


def test_every_target_exists():
    named = set(re.findall(r"^make (\S+)", "".join(blocks("console")), re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/summarize.md" in links
    assert not [link for link in links if not (ROOT / link).is_file()]
