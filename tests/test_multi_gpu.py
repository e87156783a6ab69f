"""Tensor parallelism over two and four GPUs, where a machine has them."""

import json
import re
import time

import pytest
import scripts
import torch

import build

pytestmark = pytest.mark.multi_gpu
GPUS = torch.cuda.device_count()


TIMEOUT_S = 240


RANKS = [
    pytest.param(n, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs and this machine has {GPUS}"))
    for n in (2, 4)
]
SIZES = {"n_layer": 4, "n_embd": 512, "n_head": 8, "inter_size": 1024, "vocab_size": 1001}


def messages(ranks, *arguments):
    """multi_gpu_program.py, run to its end, which mpirun sees to if need be."""
    program = scripts.script("tests/support/multi_gpu_program.py", list(arguments))
    return scripts.mpirun(ranks, program, scripts.ROOT, TIMEOUT_S)


@pytest.mark.parametrize("ranks", RANKS)
def test_messages(ranks):
    """Also 10,000 replays with random delays, in which no number is another replay's."""
    done = messages(ranks)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    wrong = re.findall(r"(\d+) wrong numbers in 10000 replays on rank (\d)", done.stdout)
    assert sorted(wrong) == [("0", str(rank)) for rank in range(ranks)]


@pytest.mark.parametrize("fault", ["wait", "empty"])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_replays_notice_a_kernel_that_does_not(ranks, fault):
    """The control: kernels that do not wait for numbers, or do not empty the places that they have read."""
    done = messages(ranks, "300", fault)
    assert done.returncode == 0, done.stderr
    wrong = [int(number) for number in re.findall(r"(\d+) wrong numbers in 300 replays", done.stdout)]
    assert len(wrong) == ranks and sum(wrong) > 0


@pytest.mark.parametrize("ranks", RANKS)
def test_the_others_end_when_a_rank_is_killed_inside(ranks):
    done = messages(ranks, "3000", "die")
    ended = time.time()
    killed = float(next(line for line in done.stdout.splitlines() if line.startswith("killed at ")).split()[2])
    assert done.returncode != 0 and ended - killed < 20
    assert "rank 1" in done.stderr and "signal 9" in done.stderr, "mpirun says which rank it was"


@pytest.fixture(scope="module", params=["v1_7b", "v2_13b"], ids=["RoPE", "ALiBi"])
def one_gpu(request, tmp_path_factory):
    """(version, the ids that one GPU makes of the prompts)"""
    return request.param, generated(tmp_path_factory.mktemp(request.param), request.param, 1, 1)


# More prompts than an engine runs at once: chunks of the later ones run beside single tokens of the earlier ones.
PROMPTS = [
    [3 + 7 * place * number % 990 for place in range(length)] for number, length in enumerate((5, 2, 40, 1, 90, 17))
]


def generated(folder, version, size, ranks):
    """32 new ids for each prompt, by a float32 engine of this world size with dummy weights."""
    prompts, output = folder / "prompts.jsonl", folder / "output.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": prompt}) + "\n" for prompt in PROMPTS))
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    common = ["--model_version", version, "--dtype", "float32", "--world_size", str(size), *sizes]
    assert build.main([*common, "--max_batch_size", "2", "--no_self_check", "--output_dir", str(folder)]) == 0
    flags = ["--engine_dir", folder, "--prompt_file", prompts, "--output_jsonl", output, "--max_output_len", 32]
    program = scripts.script("run.py", [*map(str, flags), "--top_k", "1", "--repetition_penalty", "1"])
    done = scripts.mpirun(ranks, program, scripts.ROOT, TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["ids"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize("ranks", RANKS)
def test_text_is_that_of_one_gpu(tmp_path, one_gpu, ranks):
    """float32 logits differ by rounding alone, far less than two tokens' logits of these weights do."""
    version, rows = one_gpu
    assert generated(tmp_path, version, ranks, ranks) == rows
    assert len({tuple(row) for row in rows}) == len(PROMPTS)  # the prompts have something to say


@pytest.mark.parametrize("ranks", RANKS)
def test_replicas_on_gpus_make_the_text_of_one(tmp_path, one_gpu, ranks):
    """Each rank is an engine of its own on a GPU of its own."""
    version, rows = one_gpu
    assert generated(tmp_path, version, 1, ranks) == rows
