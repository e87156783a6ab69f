"""The evaluation: both sides summarise the same articles, and their figures grow batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baichuan.config import SamplingConfig, require_range
from baichuan.errors import ConfigError
from baichuan.evaluation.rouge import KINDS, Interval, Rouge, interval
from baichuan.evaluation.scoring import agreement_of, common_prefix, negative_log_likelihood
from baichuan.evaluation.sides import Side
from baichuan.evaluation.tasks import Task
from baichuan.generation.session import Generation
from baichuan.text.tokenizer import Tokenizer

WARM_UP_TOKENS = 8  # untimed: kernels compile and graphs are captured in them


@dataclass(frozen=True)
class Request:
    """What both sides are asked."""

    sampling: SamplingConfig
    batch_size: int = 1
    max_iterations: int = 20  # batches
    output_len: int = 100  # new tokens at most
    max_input_length: int = 923  # tokens of a prompt that are kept: its last ones
    eval_ppl: bool = False

    def __post_init__(self):
        require_range("batch_size", self.batch_size, 1, 65536)
        require_range("max_ite", self.max_iterations, 1, 1 << 24)
        require_range("output_len", self.output_len, 1, 1 << 20)
        require_range("max_input_length", self.max_input_length, 1, 1 << 20)
        beams, top_k = self.sampling.num_beams, self.sampling.top_k
        if beams > 1 and top_k != 1:
            raise ConfigError(f"num_beams {beams} searches and does not sample; leave --top_k {top_k} out")


@dataclass(frozen=True)
class Summary:
    """What one side made of one article."""

    text: str
    ids: list[int]
    finish_reason: str  # stop, length
    rouge: dict[str, float]  # F-measure in percent by kind


@dataclass(frozen=True)
class SampleResult:
    """One article with the summaries of all sides."""

    task: Task
    summaries: dict[str, Summary]  # by Side.key
    identical_prefix: int | None  # tokens that both summaries begin with; None with one side


@dataclass(frozen=True)
class SideWork:
    """What one side spent on a batch."""

    latency_s: float  # wall time of generation alone: no tokenizer, no scoring
    new_tokens: int  # of the summaries, end ids included
    nll: float  # nats, of the scored tokens


@dataclass(frozen=True)
class Batch:
    """A complete batch."""

    samples: list[SampleResult]
    work: dict[str, SideWork]  # by Side.key
    scored_tokens: int  # whose probability was measured: all of the scored texts but each one's first
    kl: float  # KL(second side || first side) in nats, summed over the scored tokens
    same_choice: float  # scored tokens before which both sides have the same likeliest token


@dataclass(frozen=True)
class SideFigures:
    """One side's figures over all complete batches."""

    rouge: dict[str, Interval]
    latency_s: float
    new_tokens: int
    tokens_per_s: float
    perplexity: float | None  # of the scored texts; None where it was not asked for


@dataclass(frozen=True)
class SidesAgreement:
    """How alike the two sides are, over all complete batches."""

    identical_summaries: int
    mean_identical_prefix: float  # tokens
    mean_kl: float  # KL(Hugging Face || engine) in nats over the scored tokens
    same_first_choice: float  # share of the scored tokens before which both have the same likeliest token


@dataclass
class Evaluation:
    """Runs batches; an interruption leaves the complete ones.

    sides: with two, the second is the reference of the agreement.  Under mpirun the ranks other than 0 have the engine
    alone and no rouge: they take part in its work and judge nothing.
    scoring: whether texts are scored, on every rank alike: perplexity was asked for or rank 0 has two sides.
    """

    sides: Sequence[Side]
    tasks: Sequence[Task]
    request: Request
    tokenizer: Tokenizer
    rouge: Rouge | None
    scoring: bool
    done: list[Batch] = field(default_factory=list)

    def batches(self) -> list[Sequence[Task]]:
        """The tasks by batch, at most request.max_iterations."""
        size = self.request.batch_size
        starts = range(0, len(self.tasks), size)[: self.request.max_iterations]
        return [self.tasks[start : start + size] for start in starts]

    def check(self) -> None:
        """Raise ConfigError if a side cannot take a batch."""
        for batch in self.batches():
            for side in self.sides:
                side.check([task.prompt for task in batch], self.request.sampling, self.request.output_len)
            if self.scoring and min(len(task.scored) for task in batch) < 2:
                raise ConfigError("one token has no perplexity; give a larger --max_input_length, or build with one")

    def warm_up(self) -> None:
        """A short untimed run of the first batch."""
        prompts = [task.prompt for task in self.batches()[0]]
        for side in self.sides:
            side.generate(prompts, self.request.sampling, min(WARM_UP_TOKENS, self.request.output_len))

    def run(self, tasks: Sequence[Task]) -> None:
        """Summarise and score one batch.  Every rank calls it with the same tasks."""
        generated, latency_s = {}, {}
        for side in self.sides:
            start = time.perf_counter()
            prompts = [task.prompt for task in tasks]
            generated[side.key] = side.generate(prompts, self.request.sampling, self.request.output_len)
            latency_s[side.key] = time.perf_counter() - start
        nll, scored_tokens, kl, same = dict.fromkeys(generated, 0.0), 0, 0.0, 0.0
        for task in tasks if self.scoring else ():
            logits = [side.score(task.scored)[:-1] for side in self.sides]
            positions = len(task.scored) - 1
            for side, each in zip(self.sides, logits, strict=True):
                nll[side.key] += negative_log_likelihood(each, task.scored[1:])
            if len(logits) == 2:
                agreement = agreement_of(reference=logits[1], other=logits[0])
                kl, same = kl + positions * agreement.kl, same + positions * agreement.top1
            scored_tokens += positions
        work = {key: SideWork(latency_s[key], _count(generated[key]), nll[key]) for key in generated}
        samples = self._judge(tasks, generated) if self.rouge else []
        self.done.append(Batch(samples, work, scored_tokens, kl, same))

    @property
    def samples(self) -> list[SampleResult]:
        """Of all complete batches."""
        return [sample for batch in self.done for sample in batch.samples]

    @property
    def scored_tokens(self) -> int:
        """Of all complete batches."""
        return sum(batch.scored_tokens for batch in self.done)

    def figures(self, key: str) -> SideFigures:
        """One side's figures; at least one batch is complete."""
        work = [batch.work[key] for batch in self.done]
        latency_s, new_tokens = sum(each.latency_s for each in work), sum(each.new_tokens for each in work)
        perplexity = _exp(sum(each.nll for each in work) / self.scored_tokens) if self.request.eval_ppl else None
        rouge = {kind: interval([each.summaries[key].rouge[kind] for each in self.samples]) for kind in KINDS}
        return SideFigures(rouge, latency_s, new_tokens, new_tokens / max(latency_s, 1e-9), perplexity)

    def agreement(self) -> SidesAgreement | None:
        """None with one side; at least one batch is complete."""
        if len(self.sides) < 2:
            return None
        pairs = [[sample.summaries[side.key].ids for side in self.sides] for sample in self.samples]
        return SidesAgreement(
            sum(a == b for a, b in pairs),
            sum(sample.identical_prefix for sample in self.samples) / len(pairs),
            sum(batch.kl for batch in self.done) / self.scored_tokens,
            sum(batch.same_choice for batch in self.done) / self.scored_tokens,
        )

    def _judge(self, tasks: Sequence[Task], generated: dict[str, list[Generation]]) -> list[SampleResult]:
        highlights = [task.sample.highlights for task in tasks]
        summaries = {}
        for key, generations in generated.items():
            texts = [self.tokenizer.decode(each.ids) for each in generations]
            scores = self.rouge.score(texts, highlights)
            summaries[key] = [
                Summary(text, each.ids, each.finish_reason, {kind: scores[kind][row] for kind in KINDS})
                for row, (text, each) in enumerate(zip(texts, generations, strict=True))
            ]
        results = []
        for row, task in enumerate(tasks):
            mine = {key: each[row] for key, each in summaries.items()}
            prefix = common_prefix(*(each.ids for each in mine.values())) if len(mine) == 2 else None
            results.append(SampleResult(task, mine, prefix))
        return results


def _count(generations: Sequence[Generation]) -> int:
    return sum(len(each.ids) + (each.finish_reason == "stop") for each in generations)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)
