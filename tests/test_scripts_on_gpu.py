"""The scripts as processes on a machine with a GPU, on a checkpoint of the demo's size that is read from its files."""

import re
import subprocess

import pytest
import scripts
import torch

pytestmark = pytest.mark.cuda
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    process("benchmarks/random_checkpoint.py", "--small", "--model_version", "v2_13b", "--output_dir", folder)
    return folder


def process(script, *flags):
    """What it printed.  A process that hangs is a failure."""
    done = subprocess.run(
        scripts.script(script, list(map(str, flags))),
        cwd=scripts.ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags", [(), ("--use_weight_only", "--weight_only_precision", "int4")], ids=["float16", "int4"]
)
def test_a_build_checks_two_ranks_on_the_gpus_that_there_are(checkpoint, tmp_path, flags):
    """On one GPU as on several: there the ranks of the check are threads that share it."""
    common = ("--model_dir", checkpoint, "--world_size", 2, "--parallel_build", "--output_dir", tmp_path)
    said = process("build.py", *common, *flags)
    divergence = float(re.search(r"self-check .* mean KL (\S+) nats", said)[1])
    assert divergence < (0.01 if flags else 1e-4), "a rank's share of another rank would give more than 1"


def test_run_says_ready_and_then_runs_without_compiling(checkpoint, tmp_path):
    process("build.py", "--model_dir", checkpoint, "--output_dir", tmp_path)
    given = ("--engine_dir", tmp_path, "--max_output_len", 30, "--top_k", 1)
    said = [process("run.py", *given) for _ in range(2)][1]
    assert f"running on {torch.cuda.get_device_name(0)}" in said
    assert float(re.search(r"ready in (\S+) s", said)[1]) < 60
    assert float(re.search(r"(\S+) ms per step", said)[1]) < 20, "a kernel that is compiled takes 200 ms and more"


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with a single GPU")
def test_more_ranks_than_gpus_are_one_sentence(checkpoint, tmp_path):
    common = ("--model_dir", checkpoint, "--world_size", 2, "--no_self_check", "--output_dir", tmp_path)
    process("build.py", *common)
    program = scripts.script("run.py", ["--engine_dir", str(tmp_path), "--max_output_len", "4"])
    done = scripts.mpirun(2, program, scripts.ROOT, TIMEOUT_S)
    assert done.returncode == 2
    assert "2 ranks need a GPU each and this machine has 1" in done.stderr and "Traceback" not in done.stderr
