"""The scripts that write, each with two runs that write different contents into the same place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.evaluation.report import read_results
from tests.fuzz import good

BUILT = "--model_dir {in}/source --output_dir {out}/x --no_self_check --max_input_len 64"
RUN = "--engine_dir {in}/engine --max_output_len 4 --input_tokens {in}/p.csv --top_k"
SAMPLED = f"{RUN} 0 --top_p 0 --random_seed 3 --temperature 3.0"
CALIBRATED = "-i {in}/source -o {out} -kv -p 1 --calib_size 2 --calib_dataset {in}/source/a.jsonl --calib_max_length"
WEIGHTS = "-i {in}/source -o {out} -p 1 --calib_size 2 --calib_dataset {in}/source/a.jsonl --calib_max_length 9"
INT4 = f"{WEIGHTS} --use_weight_only --weight_only_group_size 0"
TEXT = "--test_trt_llm --engine_dir {in}/engine --eval_ppl --max_ite 4 --dataset_path {in}/a.txt --output_dir {out}/x"
SUMMARY = "--test_trt_llm --engine_dir {in}/engine --batch_size 1 --max_ite 2 --dataset_path {in}/a.jsonl"


@dataclass(frozen=True)
class Writer:
    name: str
    share: int  # share of the kills, relative to the other writers'
    main: Callable[[list[str]], int]
    runs: tuple[str, str]
    make: Callable[[Path], None]  # writes what they read
    content: Callable[[Path], object]  # what a reader finds; an exception where that is neither run's
    final: Callable[[object, object, list[object]], bool] = lambda found, before, whole: found in whole
    anew: bool = False  # a run goes on with what is there: once that is whole, it is removed


def files(folder: Path) -> dict[str, bytes]:
    """Every file that is not a leftover."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if not leftovers_hold(folder, path)}


def leftovers_hold(folder: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def report(folder: Path) -> tuple[int, int]:
    """What every file of the report says alike: the length, and the number of summaries."""
    values = read_results(folder / "x/results.json")
    assert values["complete"] is True
    lines = (folder / "x/summaries.jsonl").read_text().splitlines()
    assert len(lines) == values["articles"] == 2
    length = values["settings"]["output_len"]
    assert all("engine" in json.loads(line)["summaries"] for line in lines)
    assert all("</html>" in page.read_text() for page in (folder / "x").glob("*.html"))
    return length, len(lines)


def results(folder: Path) -> frozenset[str]:
    """Keys of the lines that are results: the last may be incomplete, as the file grows."""
    content = (folder / "x.jsonl").read_bytes() if (folder / "x.jsonl").exists() else b""
    keys = [json.loads(line)["key"] for line in content.split(b"\n")[:-1]]
    assert len(keys) == len(set(keys))
    return frozenset(keys)


def score(folder: Path) -> str:
    """The scores without the engine's path."""
    [side] = json.loads((folder / "x/perplexity.json").read_text())["sides"]
    return side["perplexity"]


def with_prompts(folder: Path) -> None:
    good.engine(folder)
    (folder / "prompts.txt").write_text("".join(f"Rain in {place}\n" for place in range(60)))


PARALLEL = "--world_size 2 --parallel_build --max_output_len"
JSONL = "--engine_dir {in}/engine --max_output_len 3 --prompt_file {in}/prompts.txt --output_jsonl {out}/x.jsonl"
WRITERS = [
    Writer("build", 5, build.main, (f"{BUILT} --max_output_len 8", f"{BUILT} --max_output_len 9"), good.calibrated,
           files),
    Writer("parallel build", 1, build.main, (f"{BUILT} {PARALLEL} 8", f"{BUILT} {PARALLEL} 9"), good.calibrated, files),
    Writer("convert", 5, hf_baichuan_convert.main, (f"{CALIBRATED} 8", f"{CALIBRATED} 12"), good.calibrated, files),
    Writer("summarize", 4, summarize.main, (f"{SUMMARY} --output_dir {{out}}/x --output_len 2",
           f"{SUMMARY} --output_dir {{out}}/x --output_len 3"), good.engine, report),
    Writer("run to .csv", 3, run.main, (f"{RUN} 1 --output_csv {{out}}/x.csv",
           f"{SAMPLED} --output_csv {{out}}/x.csv"), good.engine, files),
    Writer("run to logits", 3, run.main, (f"{RUN} 1 --output_logits_npy {{out}}/x.npy",
           f"{SAMPLED} --output_logits_npy {{out}}/x.npy"), good.engine, files),
    Writer("convert -sq", 2, hf_baichuan_convert.main, (f"{WEIGHTS} -sq 0.5", f"{WEIGHTS} -sq 0.8"), good.calibrated,
           files),
    Writer("convert by GPTQ, AWQ", 2, hf_baichuan_convert.main, (INT4, f"{INT4} --weight_only_method awq"),
           good.calibrated, files),
    Writer("score a text", 2, summarize.main, (f"{TEXT} --max_input_length 4", f"{TEXT} --max_input_length 8"),
           good.engine, score),
    Writer("run to .jsonl", 4, run.main, (f"{JSONL} --resume", f"{JSONL} --resume"), with_prompts, results,
           lambda found, before, whole: before <= found <= whole[0], anew=True),
]  # fmt: skip
