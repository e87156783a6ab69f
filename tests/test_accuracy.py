"""What each precision may cost on a trained model: the demo's, trained in full, as in docs/accuracy.md."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from demo_checkpoint import demo_checkpoint
from torch import Tensor

import weight
from baichuan.config import QuantConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.records import ModelWeights
from benchmarks import accuracy
from demo import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
ARTICLES = str(ROOT / "demo/articles.jsonl")
UNSEEN = str(ROOT / "benchmarks/unseen.txt")
VERSION, STEPS = "v2_7b", train.STEPS[True]
INT8 = "INT8 weight-only"
INT4 = "INT4 weight-only, groups of 64"
INT4_PER_CHANNEL = "INT4 weight-only, per channel"
SMOOTH = "SmoothQuant 0.5, pt + pc"
KV = "INT8 KV cache"
# Mean KL in nats that a precision may cost, on texts that the model knows and on others.
MAX_KL = {INT8: 0.005, SMOOTH: 0.01, KV: 0.005}


@dataclass(frozen=True)
class Trained:
    """The trained checkpoint in every precision, and what it says in float32."""

    model: object
    cases: dict[str, accuracy.Case]
    evaluations: dict[str, list]
    references: dict[str, list[Tensor]]

    def measure(self, label: str, dataset: str) -> accuracy.Figures:
        return accuracy.measure(self.cases[label], self.model, self.evaluations[dataset], self.references[dataset])

    def kl_of(self, weights: ModelWeights, label: str, dataset: str) -> float:
        """The mean KL of the case with other weights."""
        case = self.cases[label]
        executor = ReferenceExecutor(replace(self.model, dtype=case.dtype), case.quant, weights)
        texts, references = self.evaluations[dataset], self.references[dataset]
        pairs = list(zip(accuracy.logits_of(executor, texts), references, strict=True))
        kls = [accuracy.agreement_of(exact, logits).kl * len(ids) for (ids, logits), exact in pairs]
        return sum(kls) / sum(len(ids) for ids in texts)

    def weights(self, label: str) -> ModelWeights:
        case = self.cases[label]
        return weight.load_rank(case.source, replace(self.model, dtype=case.dtype), case.quant)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = demo_checkpoint(VERSION, STEPS)
    model = accuracy.read_model_config(folder, VERSION, "float32")
    flags = dict(calib_dataset=ARTICLES, calib_size=16, eval_dataset=[ARTICLES, UNSEEN], eval_size=16, max_length=256)
    calibration, evaluations = accuracy.read_samples(folder, model, argparse.Namespace(**flags))
    cases = {case.label: case for case in accuracy.cases_of(folder, model, calibration, tmp_path_factory.mktemp("bin"))}
    exact = accuracy.executor_of(accuracy.Case("", QuantConfig(), weight.WeightSource(folder), "float32"), model)
    references = {
        name: [logits for _, logits in accuracy.logits_of(exact, texts)] for name, texts in evaluations.items()
    }
    return Trained(model, cases, evaluations, references)


def test_the_model_is_trained(trained):
    """Otherwise the limits below would say little: an untrained model's perplexity is the vocabulary's size, 1600."""
    assert trained.measure("float32", ARTICLES).perplexity < 1.5
    assert trained.measure("float32", ARTICLES).kl == 0


@pytest.mark.parametrize("dataset", [ARTICLES, UNSEEN], ids=["known", "unseen"])
@pytest.mark.parametrize("label", MAX_KL)
def test_mean_kl_stays_below_its_limit(trained, label, dataset):
    assert trained.measure(label, dataset).kl <= MAX_KL[label]


def test_int8_weight_only_keeps_the_first_choice(trained):
    assert trained.measure(INT8, ARTICLES).top1 >= 0.99


@pytest.mark.parametrize(("dataset", "least"), [(ARTICLES, 0.9), (UNSEEN, 0.8)], ids=["known", "unseen"])
def test_groups_make_int4_better(trained, dataset, least):
    """docs/accuracy.md has 11 to 29 % less KL with groups of 64, and 17 to 50 % with groups of 32.

    Of texts that the model knows by heart, KL is too small to tell both apart.
    """
    per_channel = trained.measure(INT4_PER_CHANNEL, dataset).kl
    assert trained.measure(INT4, dataset).kl < 0.9 * per_channel
    assert trained.measure("INT4 weight-only, groups of 32", dataset).kl < least * per_channel


WRONG = 1.25  # factor by which one layer's down_proj scale is wrong


def with_wrong_scale(weights: ModelWeights) -> ModelWeights:
    first, *rest = weights.layers
    down = replace(first.down_proj, scale=first.down_proj.scale * WRONG)
    return replace(weights, layers=(replace(first, down_proj=down), *rest))


@pytest.mark.parametrize("label", [INT8, SMOOTH])
def test_a_wrong_weight_scale_is_caught(trained, label):
    """The negative control: the same measurement passes with the right scales and not with one that is wrong."""
    weights = trained.weights(label)
    assert trained.kl_of(weights, label, UNSEEN) == pytest.approx(trained.measure(label, UNSEEN).kl, rel=1e-6)
    assert trained.kl_of(with_wrong_scale(weights), label, UNSEEN) > MAX_KL[label]


def test_a_wrong_kv_scale_is_caught(trained):
    weights = trained.weights(KV)
    first, *rest = weights.layers
    changed = replace(weights, layers=(replace(first, k_scale=first.k_scale / 4), *rest))
    assert trained.kl_of(changed, KV, UNSEEN) > MAX_KL[KV] >= trained.kl_of(weights, KV, UNSEEN)
