"""Tensor parallelism over GPUs; runs where there are two or more."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build
from baichuan.config import PRESETS

pytestmark = pytest.mark.multi_gpu
ROOT = Path(__file__).resolve().parent.parent
GPUS = torch.cuda.device_count()


def mpirun(ranks, *command, timeout=240):
    program = ["mpirun", "-n", str(ranks), "--allow-run-as-root", sys.executable, *map(str, command)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("ranks", [n for n in (2, 4) if n <= GPUS] or [2])
def test_collectives(ranks):
    done = mpirun(ranks, "tests/multi_gpu_program.py")
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("version", PRESETS)
def test_text_is_the_same_on_any_number_of_gpus(tmp_path, version):
    """float32 logits differ by rounding alone, far less than two tokens' logits of these weights do."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("5,17,300,42,9\n7,8\n")
    sizes = ["--n_layer", "4", "--n_embd", "512", "--n_head", "8", "--inter_size", "1024", "--vocab_size", "1001"]
    rows = {}
    for ranks in (n for n in (1, 2, 4) if n <= GPUS):
        folder, output = tmp_path / str(ranks), tmp_path / f"{ranks}.csv"
        common = ["--model_version", version, "--dtype", "float32", "--world_size", str(ranks), *sizes]
        assert build.main([*common, "--max_batch_size", "2", "--no_self_check", "--output_dir", str(folder)]) == 0
        flags = ["--engine_dir", folder, "--input_tokens", prompts, "--output_csv", output, "--max_output_len", 32]
        done = mpirun(ranks, "run.py", *flags, "--top_k", 1, "--repetition_penalty", 1)
        assert done.returncode == 0, done.stderr
        rows[ranks] = list(csv.reader(output.read_text().splitlines()))
    assert all(each == rows[1] for each in rows.values())
    assert len({tuple(row[-32:]) for row in rows[1]}) == 2  # the prompts have something to say
