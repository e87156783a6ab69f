"""What is attacked: each script with each kind of input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.evaluation import report
from baichuan.util import manifest
from tests.fuzz import good
from tests.fuzz.flags import random_flags
from tests.fuzz.mutate_files import mutate_folder
from tests.fuzz.mutate_formats import json_tree

MAX_CONFIG_BYTES = 1 << 20  # size of the largest file that is sealed again
IN, OUT = "in", "out"  # the folders of a case: what the script reads, where it writes
HUB = "*.json *.safetensors pytorch_model* tokenizer.model"
ENGINE = "engine/*.json engine/*.engine engine/tokenizer.model"
TEXTS = "source/tokenizer.model source/generation_config.json"
BUILT = "--output_dir {out}/engine --max_input_len 64 --max_output_len 8 --no_self_check"
INT4 = "--use_weight_only --weight_only_precision int4"
CHECKED = BUILT.replace(" --no_self_check", "")
CALIBRATED = "-i {in}/source -o {out} -kv -p 1 --calib_size 2 --calib_max_length 12 --calib_dataset {in}/source/"
NPZ = "--model_dir {in}/source --enable_fp8 --fp8_kv_cache --quantized_fp8_model_path {in}/1-gpu/fp8_scales.npz"
RUN = "--engine_dir {in}/engine --max_output_len 2"
BY_IDS = f"{RUN} --input_tokens {{in}}/p.csv"
BY_FILE = f"{RUN} --prompt_file"
SUMMARY = "--test_trt_llm --engine_dir {in}/engine --output_len 2 --max_ite 1 --batch_size 2 --dataset_path {in}"
TEXT = "--test_trt_llm --engine_dir {in}/engine --eval_ppl --max_ite 2 --dataset_path {in}/a.txt --output_dir {out}/x"
HF = "--test_hf --hf_model_dir {in} --output_len 2 --max_ite 1 --dataset_path {in}/a.jsonl"


@dataclass(frozen=True)
class Target:
    """A script with one kind of input."""

    name: str
    share: float  # share of the cases, relative to the other targets'
    main: Callable[[list[str]], int]
    flags: str  # {in} and {out} stand for the folders
    make: Callable[[Path], None]  # writes the good files into a folder
    files: str = ""  # patterns of the files to change; none: the flags are changed
    finish: Callable[[Random, Path], None] | None = None  # after the change
    stdin: str | None = None  # file that is standard input

    def names(self, folder: Path) -> list[str]:
        return sorted({str(path.relative_to(folder)) for each in self.files.split() for path in folder.glob(each)})

    def mutate(self, chance: Random, folder: Path) -> tuple[str, list[str]]:
        """Change a copy of the good files; returns what was done, and the arguments."""
        done, argv = "", self.flags.split()
        if self.main is not report.main:
            argv += ["--log_level", chance.choice(("error", "error", "info"))]
        if self.files:
            done = mutate_folder(chance, folder / IN, self.names(folder / IN))
        else:
            argv = random_flags(chance, self.main, argv)
        if self.finish:
            self.finish(chance, folder / IN)
        return done, [each.replace("{in}", str(folder / IN)).replace("{out}", str(folder / OUT)) for each in argv]


def reseal(chance: Random, folder: Path) -> None:
    """Somebody who knows the format: half the time config.json itself is changed; digests and seal are right."""
    path = folder / "engine/config.json"
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return
    try:
        values = json.loads(path.read_bytes())
        values.pop("sha256", None)
        ours = values["baichuan"]
        for key in ("files", "text_files"):
            for name in ours[key]:
                if (folder / "engine" / name).is_file():
                    ours[key][name] = manifest.describe(folder / "engine" / name)
        if chance.randrange(2):
            for _ in range(chance.choice((1, 1, 2))):
                values["baichuan"] = json_tree(chance, ours)
        path.write_text(json.dumps(manifest.seal(values)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def reseal_ini(chance: Random, folder: Path) -> None:
    """Half of the changed config.ini without its seal, as the old example's are."""
    path = folder / "1-gpu/config.ini"
    if path.is_file() and path.stat().st_size < MAX_CONFIG_BYTES and chance.randrange(4):
        path.write_bytes(b"\n".join(each for each in path.read_bytes().split(b"\n") if b"sha256" not in each))


DATA_SETS = (".jsonl", ".json", ".csv", ".parquet")
_SQ = "--bin_model_dir {in}/1-gpu --use_smooth_quant --per_channel"
_ALL = [
    Target("build from safetensors", 12, build.main, f"--model_dir {{in}} {BUILT}", good.checkpoint, HUB),
    Target("build and check", 3, build.main, f"--model_dir {{in}} {CHECKED}", good.checkpoint, HUB),
    Target("build from .bin", 10, build.main, f"--model_dir {{in}} {BUILT}", good.bin_checkpoint, HUB),
    Target("build from one .bin", 6, build.main, f"--model_dir {{in}} {BUILT}", good.single_bin, HUB),
    Target("build INT8", 3, build.main, f"--model_dir {{in}} {BUILT} --use_weight_only", good.checkpoint, HUB),
    *(Target(f"build from {name}", 3, build.main, f"--model_dir {{in}} {INT4} {BUILT}", good.imported(name), HUB)
      for name in ("gptq_ordered", "awq", "compressed_zeros", "bitsandbytes_nf4", "bitsandbytes_int8")),
    Target("build SmoothQuant", 8, build.main, f"{_SQ} {BUILT}", good.smoothed, "1-gpu/*", reseal_ini),
    Target("build INT8 cache and check", 2, build.main, f"--bin_model_dir {{in}}/1-gpu --int8_kv_cache {CHECKED}",
           good.calibrated, "1-gpu/*", reseal_ini),
    Target("build calibrated INT4", 4, build.main, f"--bin_model_dir {{in}}/1-gpu {INT4} {BUILT}",
           good.calibrated_int4, "1-gpu/*", reseal_ini),
    Target("build FP8", 6, build.main, f"{NPZ} {BUILT}", good.calibrated, "1-gpu/*.npz"),
    Target("build with an adapter", 4, build.main, f"--model_dir {{in}} --lora_dir {{in}}/lora {BUILT}",
           good.with_adapter, "lora/*"),
    Target("build's flags", 5, build.main, f"--model_dir {{in}} {BUILT}", good.checkpoint),
    Target("convert", 3, hf_baichuan_convert.main, f"{CALIBRATED}a.jsonl".replace("/source", ""),
           good.with_articles, HUB),
    *(Target(f"convert with {kind}", 2, hf_baichuan_convert.main, f"{CALIBRATED}a{kind}", good.calibrated,
             f"source/a{kind}") for kind in (*DATA_SETS, ".txt")),
    Target("convert's flags", 2, hf_baichuan_convert.main, f"{CALIBRATED}a.jsonl", good.calibrated),
    Target("run sealed", 6, run.main, BY_IDS, good.engine, ENGINE),
    Target("run sealed again", 12, run.main, BY_IDS, good.engine, ENGINE, reseal),
    Target("run INT4 sealed again", 4, run.main, BY_IDS, good.int4_engine, ENGINE, reseal),
    Target("run v2 text sealed again", 3, run.main, RUN, good.v2_engine, ENGINE, reseal),
    Target("run with .csv", 7, run.main, BY_IDS, good.engine, "p.csv"),
    Target("run with .npy", 9, run.main, f"{RUN} --input_tokens {{in}}/p.npy", good.engine, "p.npy"),
    Target("run with a tokenizer", 4, run.main, f"{RUN} --tokenizer_dir {{in}}/source", good.bare_engine, TEXTS),
    Target("chat", 3, run.main, f"{RUN} --chat", good.v2_engine, "chat.txt", stdin="chat.txt"),
    *(Target(f"run with prompts{kind}", 2, run.main, f"{BY_FILE} {{in}}/f{kind} --output_jsonl {{out}}/r.jsonl",
             good.prompt_files, f"f{kind}") for kind in (".txt", ".jsonl", ".csv", ".parquet")),
    Target("run resumed", 3, run.main, f"{BY_FILE} {{in}}/f.jsonl --output_jsonl {{in}}/results.jsonl --resume",
           good.prompt_files, "results.jsonl"),
    Target("run's flags", 5, run.main, BY_IDS, good.engine),
    *(Target(f"summarize {kind}", 2, summarize.main, f"{SUMMARY}/a{kind}", good.engine, f"a{kind}")
      for kind in DATA_SETS),
    Target("summarize a text", 2, summarize.main, TEXT, good.engine, "a.txt"),
    Target("summarize a folder", 1, summarize.main, f"{SUMMARY}/data", good.engine, "data/*"),
    Target("summarize transformers' model", 4, summarize.main, HF, good.with_articles, HUB),
    Target("summarize an engine", 2, summarize.main, f"{SUMMARY}/a.jsonl --eval_ppl", good.engine, ENGINE, reseal),
    Target("summarize over a report", 1, summarize.main, f"{SUMMARY}/a.jsonl --output_dir {{in}}/one", good.reported,
           "one/*"),
    Target("summarize's flags", 3, summarize.main, f"{SUMMARY}/a.jsonl", good.engine),
    Target("report", 3, report.main, "{in}/one/results.json {in}/two/results.json", good.reported, "*/results.json"),
]  # fmt: skip
TARGETS = {target.name: target for target in _ALL}
