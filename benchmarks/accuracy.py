"""What each precision costs in accuracy: every checkpoint x precision against the same checkpoint in float32.

python benchmarks/accuracy.py --model v2_7b=FOLDER --calib_dataset FILE --eval_dataset FILE --output docs/accuracy.md

Runs on the CPU's reference executor, which defines every precision.  No text is used for both
calibration and evaluation: from a file given for both, the evaluation takes the texts after the calibration's.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weight
from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.config import DTYPES, ModelConfig, QuantConfig
from baichuan.engine.self_check import all_logits
from baichuan.errors import ConfigError
from baichuan.evaluation.scoring import agreement_of, negative_log_likelihood
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.quant.weight_only import fitting_group_sizes
from baichuan.text.texts import encode_texts, read_texts
from baichuan.text.tokenizer import Tokenizer
from baichuan.util.progress import Progress
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.rank_tensors import total_bytes

ALPHAS = (0.5, 0.8)
HEADER = "| precision | mean KL (nats) | top-1 | perplexity | engine |\n| --- | ---: | ---: | ---: | ---: |\n"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    label: str
    quant: QuantConfig
    source: weight.WeightSource
    dtype: str = "float16"


@dataclass(frozen=True)
class Figures:
    kl: float  # mean KL(float32 || this) in nats per position
    top1: float  # share of positions with the same likeliest token
    perplexity: float
    engine_bytes: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="VERSION=FOLDER", help="repeat for several")
    parser.add_argument("--calib_dataset", required=True, help="texts to calibrate on")
    parser.add_argument("--calib_size", type=int, default=128)
    parser.add_argument("--eval_dataset", action="append", required=True, help="texts to judge by; repeat for several")
    parser.add_argument("--eval_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables; they are printed in any case")
    args = parser.parse_args(argv)
    command = "python benchmarks/accuracy.py " + " ".join(argv if argv is not None else sys.argv[1:])
    report = f"# Accuracy by precision\n\nMeasured with\n\n```bash\n{command}\n```\n\n{NOTES}\n"
    with tempfile.TemporaryDirectory() as scratch:
        for index, entry in enumerate(args.model):
            version, _, folder = entry.partition("=")
            report += measure_model(version, Path(folder), args, Path(scratch) / str(index))
    print(report)
    if args.output:
        args.output.write_text(report)
    return 0


NOTES = (
    "KL and top-1 compare the next-token distributions with those of the same checkpoint in float32, after every\n"
    "token of the texts. Activations and the parts that are not quantised are in float16 where nothing else is said.\n"
    "SmoothQuant's number is its strength α; pt = one activation scale per token, pc = one weight scale per output\n"
    "channel, neither = one per tensor."
)


def measure_model(version: str, folder: Path, args: argparse.Namespace, scratch: Path) -> str:
    """One checkpoint's tables, one per evaluation data set."""
    model = read_model_config(folder, version, "float32")
    calibration, evaluations = read_samples(folder, model, args)
    cases = list(cases_of(folder, model, calibration, scratch))
    exact = executor_of(Case("", QuantConfig(), weight.WeightSource(folder), "float32"), model)
    report = (
        f"\n## {version}: {model.num_layers} layers, hidden {model.hidden_size}, intermediate "
        f"{model.intermediate_size}, vocabulary {model.vocab_size}\n"
    )
    for name, evaluation in evaluations.items():
        reference = [all_logits(exact, ids) for ids in evaluation]
        tokens = sum(map(len, evaluation))
        report += (
            f"\n{name}: {len(evaluation)} texts, {tokens} tokens; calibrated on {len(calibration)} other texts.\n\n"
        )
        report += HEADER
        with Progress(f"accuracy of {version} on {name}", len(cases), "row") as progress:
            for case in cases:
                report += row_of(case.label, measure(case, model, evaluation, reference))
                progress.advance()
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


def cases_of(folder: Path, model: ModelConfig, calibration: list, scratch: Path) -> Iterator[Case]:
    hub = weight.WeightSource(folder)
    for dtype in reversed(DTYPES):
        yield Case(dtype, QuantConfig(), hub, dtype)
    yield Case("INT8 weight-only", QuantConfig("int8"), hub)
    yield Case("INT8 weight-only, lm_head too", QuantConfig("int8", quantize_lm_head=True), hub)
    yield Case("INT4 weight-only, per channel", QuantConfig("int4"), hub)
    for size in reversed(fitting_group_sizes(model, 1)):
        yield Case(f"INT4 weight-only, groups of {size}", QuantConfig("int4", group_size=size), hub)

    def converted(alpha: float | None) -> weight.WeightSource:
        request = ConvertRequest(scratch / str(alpha), model, partial(open_checkpoint, folder, model), 1, 1, alpha)
        return weight.WeightSource(binary_folder=convert(request, calibration, {}))

    plain = converted(None)
    yield Case("INT8 KV cache", QuantConfig(kv_cache="int8"), plain)
    yield Case("INT8 weight-only, INT8 KV cache", QuantConfig("int8", kv_cache="int8"), plain)
    for alpha in ALPHAS:
        smoothed = converted(alpha)
        for per_token, per_channel, mode in (
            (False, False, "per tensor"),
            (True, False, "pt"),
            (False, True, "pc"),
            (True, True, "pt + pc"),
        ):
            quant = QuantConfig("smooth_quant", per_token=per_token, per_channel=per_channel)
            yield Case(f"SmoothQuant {alpha}, {mode}", quant, smoothed)
        yield Case(f"SmoothQuant {alpha}, pt + pc, INT8 KV cache", replace(quant, kv_cache="int8"), smoothed)
    yield Case("FP8", QuantConfig("fp8"), plain)
    yield Case("FP8 KV cache", QuantConfig(kv_cache="fp8"), plain)
    yield Case("FP8, FP8 KV cache", QuantConfig("fp8", kv_cache="fp8"), plain)


def executor_of(case: Case, model: ModelConfig) -> ReferenceExecutor:
    model = replace(model, dtype=case.dtype)
    return ReferenceExecutor(model, case.quant, weight.load_rank(case.source, model, case.quant))


def measure(case: Case, model: ModelConfig, evaluation: list, reference: list) -> Figures:
    executor = executor_of(case, model)
    positions = targets = 0
    kl = top1 = nll = 0.0
    for ids, exact in zip(evaluation, reference, strict=True):
        logits = all_logits(executor, ids)
        agreement = agreement_of(exact, logits)
        positions += len(ids)
        kl += len(ids) * agreement.kl
        top1 += len(ids) * agreement.top1
        nll += negative_log_likelihood(logits[:-1], ids[1:])
        targets += len(ids) - 1
    tensors = weight.rank_tensors(case.source, replace(model, dtype=case.dtype), case.quant, 0, 1)
    return Figures(kl / positions, top1 / positions, math.exp(nll / targets), total_bytes(tensors))


def row_of(label: str, figures: Figures) -> str:
    size = f"{figures.engine_bytes / 1e6:.2f} MB"
    return f"| {label} | {figures.kl:.6f} | {100 * figures.top1:.2f} % | {figures.perplexity:.5g} | {size} |\n"


if __name__ == "__main__":
    sys.exit(main())
