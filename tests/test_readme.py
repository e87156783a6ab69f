"""README.md does what it says: its commands run in order, its flags, targets and files exist; README.zh.md says the
same."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from demo_checkpoint import demo_checkpoint
from readme_texts import CHINESE, README, ROOT

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.engine.folder import Engine, read_engine
from baichuan.weights.hub.config_json import read_model_config
from benchmarks import random_checkpoint, readme_table
from benchmarks.random_adapter import write_adapter

CHECKPOINTS = {"baichuan-inc/Baichuan-13B-Chat": "v1_13b", "./Baichuan2-7B-Chat": "v2_7b"}
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z]\w*(?:-\w+)*")
SCRIPTS = {f"{script.__name__}.py": script.main for script in (build, run, summarize, hf_baichuan_convert)}
# What keeps a command short; argparse takes the last value that is given.
SHORTER = {
    "run.py": ["--max_output_len", "5"],
    "summarize.py": ["--max_ite", "2", "--output_len", "4"],
    "hf_baichuan_convert.py": ["--calib_max_length", "64"],
}
EXPECTED_SCRIPTS = {"build.py": 12, "hf_baichuan_convert.py": 2, "run.py": 8, "summarize.py": 4}  # at least
OF_OTHERS = {"-m", "--oversubscribe"}  # flags of python and mpirun in the prose


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str = README, language: str = "bash") -> list[list[str]]:
    """Every command of the bash blocks, in order, as words."""
    lines = "".join(blocks(language, text)).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def script_of(words: list[str]) -> str:
    return words[words.index("python") + 1]


def flags_of(words: list[str]) -> list[str]:
    return words[words.index("python") + 2 :]


def here(words: list[str], folder: Path, checkpoints: dict[str, Path]) -> list[str]:
    """The command on small checkpoints, with ./tmp/ in `folder`."""

    def word_here(word: str) -> str:
        return str(checkpoints[word]) if word in checkpoints else word.replace("./tmp/", f"{folder}/")

    shorter = SHORTER.get(script_of(words), [])
    return [*map(word_here, words), *(shorter[:2] if "--eval_ppl" in words else shorter)]


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
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    found = {name: demo_checkpoint(version, 3) for name, version in CHECKPOINTS.items()}
    adapter, gptq = (tmp_path_factory.mktemp(name) for name in ("adapter", "gptq"))
    write_adapter(adapter, read_model_config(found["baichuan-inc/Baichuan-13B-Chat"], "v1_13b", "float16"))
    gptq_flags = ["--model_version", "v1_13b", "--small", "--gptq", "--output_dir", str(gptq)]
    assert random_checkpoint.main(gptq_flags) == 0
    return found | {"./my-adapter": adapter, "./Baichuan-13B-Chat-GPTQ": gptq}


def check_predicted_bytes(engine: Engine) -> None:
    """The table's way of computing an engine's bytes gives those of a real one."""
    with open(engine.rank_file(0), "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")  # bytes of a safetensors file's header
    cache_scales = 0 if engine.quant.kv_cache == "none" else engine.model.num_layers * 2 * 4
    predicted = readme_table.engine_bytes(engine.model, replace(engine.quant, kv_cache="none")) + cache_scales
    assert engine.rank_file(0).stat().st_size == header + predicted


COMMANDS = commands()


def folder_of(words: list[str]) -> str | None:
    """The folder that a command writes."""
    return next((words[words.index(flag) + 1] for flag in ("--output_dir", "-o") if flag in words), None)


def needs(number: int) -> list[int]:
    """The earlier commands whose folders this one reads."""
    own = folder_of(COMMANDS[number])
    read = [word for word in COMMANDS[number] if word.startswith("./tmp/") and word != own]
    made = {earlier: folder_of(COMMANDS[earlier]) for earlier in range(number)}
    return [earlier for earlier, folder in made.items() if folder and any(word.startswith(folder) for word in read)]


class Workflow:
    """The README's commands in one folder, each run once, after those that it needs."""

    def __init__(self, folder: Path, checkpoints: dict[str, Path]):
        self.folder, self.checkpoints = folder, checkpoints
        self.done: dict[int, tuple[int, str, str]] = {}

    def given(self, number: int) -> list[str]:
        return here(COMMANDS[number], self.folder, self.checkpoints)

    def run(self, number: int, monkeypatch, capsys) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        if number not in self.done:
            for earlier in needs(number):
                assert self.run(earlier, monkeypatch, capsys)[0] == 0, shlex.join(COMMANDS[earlier])
            monkeypatch.setattr(sys, "stdin", io.StringIO("你好\nexit\n"))
            self.done[number] = execute(self.given(number), capsys)
        return self.done[number]


@pytest.fixture(scope="module")
def workflow(checkpoints, tmp_path_factory) -> Workflow:
    return Workflow(tmp_path_factory.mktemp("readme"), checkpoints)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: script_of(COMMANDS[number]))
def test_every_command_runs(workflow, monkeypatch, capsys, number):
    monkeypatch.chdir(ROOT)
    words, given = COMMANDS[number], workflow.given(number)
    script, (code, out, err) = script_of(words), workflow.run(number, monkeypatch, capsys)
    assert code == 0, err
    if script == "build.py":
        engine = read_engine(Path(given[given.index("--output_dir") + 1]))
        for rank in range(engine.build.world_size):
            assert engine.rank_file(rank).stat().st_size > 1 << 20
        assert "self-check against the float32 weights: mean KL" in err
        if engine.build.world_size == 1:
            check_predicted_bytes(engine)
    elif script == "run.py" and "--chat" in words and "--input_text" not in words:
        assert re.search(r"\n> .+\n(\[cut .*\n)?> \Z", out), out
    elif script == "run.py" and "--prompt_file" in words:
        lines = Path(given[given.index("--output_jsonl") + 1]).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["key"] for line in lines] == ["peak", "poem", "chat"], err
    elif script == "run.py":
        assert out.count('Output: "') == 1 and out.rstrip().endswith('"'), out
    elif script == "summarize.py" and "--eval_ppl" in words:
        assert re.search(r"engine, float16, INT4 weight-only, groups of 32 +\d+\.\d+ +\d\.\d+e", out), out
    elif script == "summarize.py":
        assert out.count("Summary (engine, float16") == 1 and "ROUGE-1" in out, out
    else:
        folder = Path(given[given.index("-o") + 1])
        assert (folder / "1-gpu" / "config.ini").is_file()


def test_every_script_is_shown_often_enough():
    shown = [script_of(words) for words in COMMANDS]
    assert all(shown.count(script) >= least for script, least in EXPECTED_SCRIPTS.items()), shown


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        (lambda words: [*words, "--dtyp", "float16"], 2, "unrecognized arguments: --dtyp, did you mean --dtype?"),
        (lambda words: [*words, "--world_size", "3"], 2, "num_heads 10 is not divisible by"),
        (lambda words: [*words, "--model_version", "v2_7b"], 2, "contradicts"),
    ],
)
def test_a_wrong_command_fails(checkpoints, tmp_path, monkeypatch, capsys, change, code, sentence):
    """The negative control: execute() reports a command that does not do what it says."""
    monkeypatch.chdir(ROOT)
    words = change(here(commands()[3], tmp_path, checkpoints))
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
        found[name] = set(re.findall(FLAG, done.stdout))
    return found


def test_every_flag_exists(known_flags):
    for words in commands():
        for word in flags_of(words):
            if re.match(r"--?[a-zA-Z]", word):
                assert word in known_flags[script_of(words)], f"{script_of(words)} has no {word}"
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    mentioned = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(FLAG, code)}
    assert {"--per_channel", "--calib_dataset", "-sq", "--fp8_kv_cache"} <= mentioned
    assert not mentioned - OF_OTHERS - set.union(*known_flags.values())
    assert "--use_weight_only" in known_flags["build.py"] and "--use_weight_only" not in known_flags["run.py"]


def test_every_target_exists():
    named = set(re.findall(r"^make (\S+)", "".join(blocks("console")), re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "doctor"} <= named <= targets


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/summarize.md" in links
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_the_chinese_readme_says_the_same():
    for language in ("bash", "console"):
        assert commands(CHINESE, language) == commands(README, language)
    for pattern in (r"^#+(?= )", r"\]\((?!#)([^)]+)\)", r"^\|(?!-)[^|]*", r"(?<!\S)--?[a-z]\w+", r"^- "):
        english, chinese = (re.findall(pattern, prose(text), re.MULTILINE) for text in (README, CHINESE))
        if pattern.startswith(r"^\|"):  # rows, whose words are translated
            english, chinese = len(english), len(chinese)
        elif "--" in pattern:
            english, chinese = set(english), set(chinese)
        assert english == chinese


def prose(text: str) -> str:
    """Without code blocks, and without the lines that name the other language."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"^.*\]\(README[^)]*\).*$", "", text, flags=re.MULTILINE).replace("`", " ")


def test_the_links_of_docs_lead_to_headings():
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert anchor in anchors, f"{path.name}: #{anchor}"
