"""build.py and run.py over the golden checkpoints: their flags, in this process, in another or under mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import goldens
import numpy as np

import build
from baichuan.engine.folder import Engine
from baichuan.executors import kv_cache
from baichuan.executors.open_settings import OpenSettings

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
NEW_TOKENS = 24  # per prompt in the goldens
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
GREEDY = ("--top_k", "1", "--repetition_penalty", "1", "--max_output_len", str(NEW_TOKENS))


def build_flags(folder: Path, version: str, *more: str) -> list[str]:
    """build.py's flags for a float32 engine that just holds the goldens."""
    given = ["--model_version", version, "--model_dir", str(goldens.checkpoint(version)), "--dtype", "float32"]
    limits = ["--max_batch_size", "4", "--max_input_len", "128", "--max_output_len", str(NEW_TOKENS)]
    return [*given, *limits, "--max_beam_width", "2", "--output_dir", str(folder), *more]


def built(folder: Path, version: str, tp_size: int = 1, *more: str) -> Path:
    """An engine by build.py, without the self-check, which test_scripts.py runs once."""
    given = ["--world_size", str(tp_size), "--no_self_check", "--log_level", "error", *more]
    assert build.main(build_flags(folder, version, *given)) == 0
    return folder


def prompts_csv(path: Path, version: str, lengths=goldens.LENGTHS) -> Path:
    rows = [goldens.golden(version)[f"ids_{length}"].tolist() for length in lengths]
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def run_flags(engine: Path, csv: Path, out: Path, *more: str) -> list[str]:
    """run.py's flags for the goldens' continuations, as out/ids.csv, out/ids.npy and out/logits.npy."""
    files = ["--output_csv", "ids.csv", "--output_npy", "ids.npy", "--output_logits_npy", "logits.npy"]
    files = [str(out / name) if name[0] != "-" else name for name in files]
    return ["--engine_dir", str(engine), "--input_tokens", str(csv), *files, *GREEDY, *more]


def text_flags(engine: Path, version: str, *more: str) -> list[str]:
    """run.py's flags for texts, without the texts."""
    return ["--engine_dir", str(engine), "--tokenizer_dir", str(goldens.checkpoint(version)), *GREEDY, *more]


def check_outputs(out: Path, version: str, lengths=goldens.LENGTHS) -> None:
    """The three files hold the goldens' ids exactly and their logits within the goldens' tolerance."""
    golden = goldens.golden(version)
    expected = [golden[f"ids_{length}"].tolist() + golden[f"gen_{length}"].tolist() for length in lengths]
    assert [list(map(int, line.split(","))) for line in (out / "ids.csv").read_text().splitlines()] == expected
    ids, logits = np.load(out / "ids.npy"), np.load(out / "logits.npy")
    assert ids.dtype == np.int32 and ids.shape == (len(lengths), max(lengths) + NEW_TOKENS)
    for row, wanted in zip(ids.tolist(), expected, strict=True):
        assert row[: len(wanted)] == wanted and not any(row[len(wanted) :])  # the rest is padding, id 0
    assert logits.dtype == np.float32 and logits.shape[:2] == (len(lengths), NEW_TOKENS)
    for row, length in zip(logits, lengths, strict=True):
        assert np.abs(row - golden[f"gen_logits_{length}"].numpy()).max() <= goldens.FLOAT32_TOLERANCE


def code_of(main, given: list[str]) -> int:
    """main's exit code, argparse's own too."""
    try:
        return main(given)
    except SystemExit as stop:
        return stop.code


def refused(main, given: list[str], sentence: str, capsys) -> None:
    """Exit code 2, and one line on standard error that holds `sentence`."""
    assert code_of(main, [*given, "--log_level", "error"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and sentence in lines[0] and ": error" in lines[0], lines


def script(name: str, given: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / name), *given]


def mpirun(
    ranks: int, program: list[str], cwd: Path, timeout_s: float = 120, typed: str = ""
) -> subprocess.CompletedProcess:
    """Run `program` on this many ranks until it ends; rank 0 reads `typed` from standard input."""
    launcher = [str(MPIRUN), "-n", str(ranks), "--oversubscribe", "--allow-run-as-root"]
    return subprocess.run(
        [*launcher, *program],
        env=ENVIRONMENT,
        input=typed,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
    )


def sentences(err: str) -> list[str]:
    """The lines in which the scripts say what is wrong, without mpirun's own."""
    return [line for line in err.splitlines() if ": error" in line]


def leave_blocks(count: int, engine: Engine, monkeypatch) -> None:
    """Let the KV caches of float32 engines of this shape have as many blocks."""
    model = engine.model
    block_bytes = 2 * model.num_layers * engine.build.tokens_per_block * model.hidden_size * 4
    free = block_bytes * (count + 0.5) / OpenSettings().kv_cache_free_gpu_mem_fraction
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: free)
