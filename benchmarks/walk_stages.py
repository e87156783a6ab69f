"""What benchmarks/walk.py walks: the README's commands, stage by stage."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
QUESTION = "世界上第二高的山峰是哪座？"
INT4 = ("--use_weight_only", "--weight_only_precision", "int4")


@dataclass(frozen=True)
class Command:
    """One line of the walk."""

    name: str
    argv: tuple[str, ...]
    engine: Path | None = None  # the folder that it writes, whose size is reported
    leaves: tuple[Path, ...] = ()  # paths that no later command needs


@dataclass(frozen=True)
class Walk:
    """The commands over one checkpoint."""

    version: str
    folder: Path
    small: bool
    ranks: tuple[int, ...]  # tp_size of each tensor-parallel stage
    calibrated: Path  # where calibrated folders are written

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def stages(self) -> dict[str, list[Command]]:
        """The commands by stage; a stage needs only the checkpoint."""
        stages = {
            "float16": self._use("float16", ("--dtype", "float16"), everything=True),
            "bfloat16": self._use("bfloat16", ("--dtype", "bfloat16")),
            "int8": self._use("int8", ("--use_weight_only",)),
            "int4": self._use("int4", INT4),
            "fp8": self._use("fp8 alone", ("--enable_fp8", "--per_token", "--per_channel")),
            "kv": list(self._kv()),
            "sq": list(self._smooth_quant()),
            "sq_auto": list(self._strengths()),
            "calibrated": list(self._calibrated_int4("int4", "calibrated")),
            "awq": list(self._calibrated_int4("awq", "AWQ", "--weight_only_method", "awq")),
            "imported": list(self._imported()),
        }
        if self.ranks:
            stages["replicas"] = list(self._replicas())
        return stages | {f"tp{ranks}": list(self._ranks(ranks)) for ranks in self.ranks}

    def _kv(self) -> Iterator[Command]:
        binary = self.calibrated / "kv"
        gpu = binary / "1-gpu"
        yield self._convert("convert -kv", binary, "--calibrate-kv-cache")
        yield from self._use("int8, INT8 KV", ("--int8_kv_cache", "--use_weight_only"), gpu)
        yield from self._use("fp8, FP8 KV", ("--enable_fp8", "--fp8_kv_cache"), gpu)
        scales = ("--enable_fp8", "--quantized_fp8_model_path", str(gpu / "fp8_scales.npz"))
        yield from self._use("fp8 from the checkpoint", scales, leaves=(binary,))

    def _smooth_quant(self) -> Iterator[Command]:
        binary = self.calibrated / "sq"
        gpu = binary / "1-gpu"
        yield self._convert("convert -sq 0.8", binary, "-sq", "0.8")
        modes = {
            "sq per tensor": (),
            "sq per token": ("--per_token",),
            "sq per channel": ("--per_channel",),
            "sq, INT8 KV": ("--per_token", "--per_channel", "--int8_kv_cache"),
        }
        for name, flags in modes.items():
            last = name == list(modes)[-1]
            yield from self._use(name, ("--use_smooth_quant", *flags), gpu, leaves=(binary,) if last else ())

    def _strengths(self) -> Iterator[Command]:
        """SmoothQuant's strengths found for each mode, of which one is built."""
        binary = self.calibrated / "sq-auto"
        yield self._convert("convert -sq auto", binary, "-sq", "auto")
        flags = ("--use_smooth_quant", "--per_token", "--per_channel")
        yield from self._use("sq auto", flags, binary / "1-gpu", leaves=(binary,))

    def _calibrated_int4(self, folder: str, how: str, *flags: str) -> Iterator[Command]:
        binary = self.calibrated / folder
        yield self._convert(f"convert {folder}", binary, *INT4, *flags)
        yield from self._use(f"int4, {how}", INT4, binary / "1-gpu", leaves=(binary,))

    def _imported(self) -> Iterator[Command]:
        """A checkpoint that GPTQ quantised, and a fine-tuned one: an adapter beside the checkpoint."""
        quantised, adapter = self.folder / "quantised", self.folder / "adapter"
        yield self.random("checkpoint by GPTQ", "random_checkpoint.py", quantised, "--gptq")
        yield from self._use("int4 of GPTQ", INT4, checkpoint=quantised, leaves=(quantised,))
        yield self.random("adapter", "random_adapter.py", adapter)
        yield from self._use("int8 with LoRA", ("--use_weight_only", "--lora_dir", adapter), leaves=(adapter,))

    def _replicas(self) -> Iterator[Command]:
        """Two replicas of an engine of one rank share the work."""
        engine, results = self.folder / "engine-replicas", self.folder / "replicas.jsonl"
        yield self._build("replicas", engine, ("--use_weight_only",))
        yield Command("run two replicas", (*launcher(2), *self._run_batch(engine, results)), leaves=(engine,))

    def _ranks(self, ranks: int) -> Iterator[Command]:
        name, engine = f"tp {ranks}", self.folder / f"engine-tp{ranks}"
        yield self._build(name, engine, ("--dtype", "float16", "--world_size", str(ranks), "--parallel_build"))
        for turn in ("first", "second"):
            yield Command(f"run {name}, {turn} time", (*launcher(ranks), *self._run(engine)))
        yield Command(f"summarize {name}", (*launcher(ranks), *self._summarize(engine)), leaves=(engine,))

    def _use(self, name, flags, binary=None, everything=False, leaves=(), checkpoint=None) -> list[Command]:
        """Build an engine and run it."""
        engine = self.folder / ("engine-" + re.sub(r"\W+", "-", name))
        commands = [self._build(name, engine, flags, binary, checkpoint)]
        if not everything:
            return [*commands, Command(f"run {name}", self._run(engine), leaves=(engine, *leaves))]
        prompts, ids = self.folder / "prompts.csv", self.folder / "ids.csv"
        arrays = ("--output_npy", ids.with_suffix(".npy"), "--output_logits_npy", self.folder / "logits.npy")
        files = ("--input_tokens", prompts, "--output_csv", ids, *arrays)
        ways = {
            "run, first time": self._run(engine),
            "run, second time": self._run(engine),
            "run --chat --streaming": self._run(engine, "--chat", "--streaming", "--input_text", QUESTION),
            "run with files": self._script("run.py", "--max_output_len", "20", "--engine_dir", engine, *files),
            "run with beams": self._run(engine, "--num_beams", "2"),
            "run a file of prompts": self._run_batch(engine, self.folder / "results.jsonl"),
            "score a text": self._score(engine, ROOT / "benchmarks" / "unseen.txt"),
            "summarize, both sides": self._summarize(engine, "--test_hf", "--eval_ppl"),
        }
        commands += [Command(way, argv) for way, argv in ways.items()]
        return [*commands[:-1], Command(commands[-1].name, commands[-1].argv, leaves=(engine, *leaves))]

    def random(self, name: str, script: str, output: Path, *flags: str) -> Command:
        """Something of random weights, of the size that is walked."""
        size = ("--small",) if self.small else ()
        argv = self._script(f"benchmarks/{script}", "--model_version", self.version, "--output_dir", output)
        return Command(name, (*argv, *flags, *size), output)

    def _script(self, script: str, *flags) -> tuple[str, ...]:
        return (sys.executable, str(ROOT / script), *map(str, flags))

    def _convert(self, name: str, output: Path, *flags) -> Command:
        common = ("--model_version", self.version, "-i", self.checkpoint, "-o", output, "-t", "fp16")
        texts = ("--calib_dataset", DEMO / "articles.jsonl", *(("--calib_size", "2") if self.small else ()))
        argv = self._script("hf_baichuan_convert.py", *common, *flags, *texts)
        return Command(name, argv, output)

    def _build(self, name: str, engine: Path, flags, binary=None, checkpoint=None) -> Command:
        source = ("--bin_model_dir", binary) if binary else ("--model_dir", checkpoint or self.checkpoint)
        limits = ("--max_batch_size", "4", "--max_beam_width", "2", "--output_dir", engine)
        argv = self._script("build.py", "--model_version", self.version, *source, *flags, *limits)
        return Command(f"build {name}", argv, engine)

    def _run(self, engine: Path, *flags) -> tuple[str, ...]:
        length = (
            ("--max_output_len", "100", "--top_k", "1") if "--num_beams" not in flags else ("--max_output_len", "50")
        )
        return self._script("run.py", *length, "--tokenizer_dir", self.checkpoint, "--engine_dir", engine, *flags)

    def _run_batch(self, engine: Path, results: Path) -> tuple[str, ...]:
        files = ("--prompt_file", DEMO / "prompts.jsonl", "--output_jsonl", results, "--resume")
        return self._run(engine, *files)

    def _score(self, engine: Path, text: Path) -> tuple[str, ...]:
        common = ("--test_trt_llm", "--eval_ppl", "--hf_model_dir", self.checkpoint)
        return self._script("summarize.py", *common, "--dataset_path", text, "--engine_dir", engine)

    def _summarize(self, engine: Path, *flags) -> tuple[str, ...]:
        common = ("--test_trt_llm", "--hf_model_dir", self.checkpoint, "--data_type", "fp16", "--engine_dir", engine)
        shape = ("--batch_size", "4", "--max_ite", "4", "--output_len", "50", "--dataset_path", DEMO / "articles.jsonl")
        return self._script("summarize.py", *common, *shape, *flags)


def launcher(ranks: int) -> tuple[str, ...]:
    return ("mpirun", "-n", str(ranks), "--allow-run-as-root", "--oversubscribe")


def checkpoint_command(journey: Walk) -> Command:
    return journey.random("checkpoint", "random_checkpoint.py", journey.checkpoint)
