"""What each precision costs in accuracy: every checkpoint x precision against the same checkpoint in float32.

python benchmarks/accuracy.py --model v2_7b=FOLDER --calib_dataset FILE --eval_dataset FILE --output docs/accuracy.md
python benchmarks/accuracy.py --real_model --output docs/accuracy.md

--output replaces the tables between two marks and leaves what people wrote around them.

Runs on the CPU's reference executor, which defines every precision.  No text is used for both
calibration and evaluation: from a file given for both, the evaluation takes the texts after the calibration's.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weight
from baichuan.calibration.convert import convert
from baichuan.calibration.request import METHODS, ConvertRequest
from baichuan.config import DTYPES, ModelConfig, QuantConfig, WeightOnly
from baichuan.errors import ConfigError
from baichuan.evaluation.scoring import agreement_of, negative_log_likelihood
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.quant.weight_only import fitting_group_sizes
from baichuan.records import Step
from baichuan.text.texts import encode_texts, read_texts
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.rank_tensors import total_bytes
from benchmarks import real_model

MODES = ((False, False, "per tensor"), (True, False, "pt"), (False, True, "pc"), (True, True, "pt + pc"))
TOKENS_PER_STEP = 1024  # a weight is dequantised once for so many tokens; bounds the logits' memory
ALPHAS: tuple[float | Literal["auto"], ...] = (0.5, 0.8, "auto")
BEGIN = "<!-- {} made by benchmarks/accuracy.py -->\n"
END = "<!-- end of the tables -->\n"
HEADER = "| precision | mean KL (nats) | top-1 | perplexity | engine |\n| --- | ---: | ---: | ---: | ---: |\n"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    label: str
    quant: QuantConfig
    source: weight.WeightSource
    dtype: str = "float16"


@dataclass(frozen=True)
class Conversion:
    """What a binary folder is converted for."""

    alpha: float | Literal["auto"] | None = None  # SmoothQuant's
    form: WeightOnly | None = None  # form of calibrated integers, if any
    method: str = "gptq"  # the method that finds them


@dataclass(frozen=True)
class Figures:
    kl: float  # mean KL(float32 || this) in nats per position
    top1: float  # share of positions with the same likeliest token
    perplexity: float
    engine_bytes: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="VERSION=FOLDER", help="repeat for several")
    parser.add_argument("--real_model", action="store_true", help="real_model.py's model and texts instead")
    parser.add_argument("--calib_dataset", help="texts to calibrate on")
    parser.add_argument("--calib_size", type=int, default=128)
    parser.add_argument("--eval_dataset", action="append", help="texts to judge by; repeat for several")
    parser.add_argument("--eval_size", type=int, default=32)
    parser.add_argument("--only", nargs="+", metavar="REGEX", help="rows whose name has one of these in it")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--mark", help="name of the marks around the tables (default: real or demo)")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables; they are printed in any case")
    args = parser.parse_args(argv)
    if not args.real_model and not (args.model and args.calib_dataset and args.eval_dataset):
        parser.error("give --real_model, or --model, --calib_dataset and --eval_dataset")
    command = shlex.join(["python", "benchmarks/accuracy.py", *(argv if argv is not None else sys.argv[1:])])
    report = f"Measured with\n\n```bash\n{command}\n```\n"
    with tempfile.TemporaryDirectory() as scratch:
        if args.real_model:
            report += measure_real_model(args, Path(scratch))
        for index, entry in enumerate(args.model or ()):
            version, _, folder = entry.partition("=")
            report += measure_checkpoint(version, Path(folder), args, Path(scratch) / str(index))
    print(report)
    if args.output:
        text = args.output.read_text("utf-8") if args.output.exists() else ""
        args.output.write_text(with_tables(text, args.mark or ("real" if args.real_model else "demo"), report), "utf-8")
    return 0


def with_tables(text: str, name: str, tables: str) -> str:
    """The text with the tables between the marks of this name replaced, or added at its end."""
    before, mark, rest = text.partition(BEGIN.format(name))
    after = rest.partition(END)[2] if mark else ""
    return before + BEGIN.format(name) + tables + END + after


def measure_real_model(args: argparse.Namespace, scratch: Path) -> str:
    """The real model's table."""
    tokenizer = real_model.BpeTokenizer()
    real_model.make_checkpoint(scratch / "checkpoint")
    model = read_model_config(scratch / "checkpoint", "v1_7b", "float32")
    calibration = real_model.windows(real_model.calibration_text(), tokenizer, args.calib_size, args.max_length)
    judged = real_model.windows(real_model.evaluation_text(), tokenizer, args.eval_size, args.max_length)
    evaluations = {"docstrings of Python's standard library": judged}
    return measure_model(scratch / "checkpoint", model, calibration, evaluations, args.only, scratch)


def measure_checkpoint(version: str, folder: Path, args: argparse.Namespace, scratch: Path) -> str:
    """A checkpoint's tables, one per evaluation data set."""
    model = read_model_config(folder, version, "float32")
    return measure_model(folder, model, *read_samples(folder, model, args), args.only, scratch)


def measure_model(
    folder: Path, model: ModelConfig, calibration: list, evaluations: Mapping[str, list], only, scratch: Path
) -> str:
    exact = executor_of(Case("", QuantConfig(), weight.WeightSource(folder), "float32"), model)
    report = (
        f"\n## {model.model_version}: {model.num_layers} layers, hidden {model.hidden_size}, intermediate "
        f"{model.intermediate_size}, vocabulary {model.vocab_size}\n"
    )
    for name, evaluation in evaluations.items():
        reference = [logits for _, logits in logits_of(exact, evaluation)]
        counts = [sum(map(len, texts)) for texts in (evaluation, calibration)]
        report += (
            f"\n{name}: {len(evaluation)} texts, {counts[0]} tokens; "
            f"calibrated on {len(calibration)} other texts, {counts[1]} tokens.\n\n"
        )
        report += HEADER
        for case in cases_of(folder, model, calibration, scratch, only):
            row = row_of(case.label, measure(case, model, evaluation, reference))
            print(row, end="", file=sys.stderr, flush=True)  # the report comes when all are measured
            report += row
    return report


def read_samples(folder: Path, model: ModelConfig, args: argparse.Namespace) -> tuple[list, dict[str, list]]:
    """Token ids of the calibration texts, and of the evaluation texts by data set; no text is in both."""
    encode = partial(encode_texts, tokenizer=Tokenizer(folder), max_length=args.max_length, vocab_size=model.vocab_size)
    calibration = read_texts(args.calib_dataset, args.calib_size, "--calib_dataset")
    evaluations = {}
    for dataset in args.eval_dataset:
        skipped = len(calibration) if dataset == args.calib_dataset else 0
        texts = read_texts(dataset, args.eval_size + skipped, "--eval_dataset")[skipped:]
        if not texts:
            raise ConfigError(f"--eval_dataset {dataset} has no texts beyond the calibration's; lower --calib_size")
        evaluations[dataset] = [ids for ids in encode(texts) if len(ids) > 1]
    return encode(calibration), evaluations


def wanted_row(label: str, only: list[str] | None) -> bool:
    return not only or any(re.search(each, label) for each in only)


def cases_of(folder: Path, model: ModelConfig, calibration: list, scratch: Path, only=None) -> Iterator[Case]:
    """The rows that are wanted, in their order; folders are converted when a row needs them."""
    for label, quant, how, dtype in rows_of(model):
        if wanted_row(label, only):
            yield Case(label, quant, source_of(how, folder, model, calibration, scratch), dtype)


def rows_of(model: ModelConfig) -> Iterator[tuple[str, QuantConfig, Conversion | None, str]]:
    """(label, quantisation, conversion that it is built from, None = the checkpoint itself, dtype)"""
    half, groups = "float16", list(reversed(fitting_group_sizes(model, 1)))
    for dtype in reversed(DTYPES):
        yield dtype, QuantConfig(), None, dtype
    yield "INT8 weight-only", QuantConfig("int8"), None, half
    yield "INT8 weight-only, lm_head too", QuantConfig("int8", quantize_lm_head=True), None, half
    yield "INT8 by GPTQ", QuantConfig("int8"), Conversion(form=WeightOnly("int8")), half
    yield "INT4 weight-only, per channel", QuantConfig("int4"), None, half
    for size in groups:
        yield f"INT4 weight-only, groups of {size}", QuantConfig("int4", group_size=size), None, half
    for method in METHODS:
        for size in groups:
            form = WeightOnly("int4", size)
            quant = QuantConfig("int4", group_size=size, zero_points=form.zero_points)
            yield f"INT4 by {method.upper()}, groups of {size}", quant, Conversion(form=form, method=method), half
    plain = Conversion()
    yield "INT8 KV cache", QuantConfig(kv_cache="int8"), plain, half
    yield "INT8 weight-only, INT8 KV cache", QuantConfig("int8", kv_cache="int8"), plain, half
    for alpha in ALPHAS:
        for per_token, per_channel, mode in MODES:
            quant = QuantConfig("smooth_quant", per_token=per_token, per_channel=per_channel)
            yield f"SmoothQuant {alpha}, {mode}", quant, Conversion(alpha), half
        cached = replace(quant, kv_cache="int8")
        yield f"SmoothQuant {alpha}, pt + pc, INT8 KV cache", cached, Conversion(alpha), half
    for per_token, per_channel, mode in MODES:
        quant = QuantConfig("fp8", per_token=per_token, per_channel=per_channel)
        yield f"FP8, {mode}", quant, None if per_token and per_channel else plain, half
    yield "FP8 KV cache", QuantConfig(kv_cache="fp8"), plain, half
    yield "FP8, pt + pc, FP8 KV cache", replace(quant, kv_cache="fp8"), plain, half


def source_of(how: Conversion | None, folder: Path, model: ModelConfig, calibration: list, scratch: Path):
    if how is None:
        return weight.WeightSource(folder)
    out = scratch / str(how.alpha) / (f"{how.method} {vars(how.form)}" if how.form else "ranges")
    source = partial(open_checkpoint, folder, model)
    request = ConvertRequest(out, model, source, processes=1, alpha=how.alpha, weight_only=how.form, method=how.method)
    return weight.WeightSource(binary_folder=request.folder if out.exists() else convert(request, calibration, {}))


def executor_of(case: Case, model: ModelConfig) -> ReferenceExecutor:
    model = replace(model, dtype=case.dtype)
    return ReferenceExecutor(model, case.quant, weight.load_rank(case.source, model, case.quant))


def measure(case: Case, model: ModelConfig, evaluation: list, reference: list) -> Figures:
    executor = executor_of(case, model)
    positions = targets = 0
    kl = top1 = nll = 0.0
    for (ids, logits), exact in zip(logits_of(executor, evaluation), reference, strict=True):
        agreement = agreement_of(exact, logits)
        positions += len(ids)
        kl += len(ids) * agreement.kl
        top1 += len(ids) * agreement.top1
        nll += negative_log_likelihood(logits[:-1], ids[1:])
        targets += len(ids) - 1
    tensors = weight.rank_tensors(case.source, replace(model, dtype=case.dtype), case.quant, 0, 1)
    return Figures(kl / positions, top1 / positions, math.exp(nll / targets), total_bytes(tensors))


def logits_of(executor: ReferenceExecutor, texts: list) -> Iterator[tuple[list, Tensor]]:
    """Each text and the logits after each of its tokens, [tokens, vocab_size] float32."""
    longest = max(map(len, texts))
    for start in range(0, len(texts), count := max(1, TOKENS_PER_STEP // longest)):
        some = texts[start : start + count]
        executor.reset(len(some), longest)
        logits = executor.forward(Step.of(some, all_outputs=True))
        yield from zip(some, logits.split([len(ids) for ids in some]), strict=True)


def row_of(label: str, figures: Figures) -> str:
    size = f"{figures.engine_bytes / 1e6:.2f} MB"
    return f"| {label} | {figures.kl:.6f} | {100 * figures.top1:.2f} % | {figures.perplexity:.5g} | {size} |\n"


if __name__ == "__main__":
    sys.exit(main())
