"""The evaluation: every side summarises the same articles, and their figures grow batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baichuan.config import EngineSpec
from baichuan.errors import ConfigError
from baichuan.evaluation.request import Request
from baichuan.evaluation.rouge import KINDS, Interval, Rouge, interval
from baichuan.evaluation.scoring import agreement_of, common_prefix, negative_log_likelihood
from baichuan.evaluation.sides import Side
from baichuan.evaluation.tasks import Task
from baichuan.generation.decoding import Generation
from baichuan.generation.limits import check_request
from baichuan.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Summary:
    """One side's summary of one article."""

    text: str
    ids: list[int]
    finish_reason: str  # stop, length
    rouge: dict[str, float]  # F-measure in percent by kind
    identical_prefix: int | None  # first tokens equal to the reference's; None without another side as reference


@dataclass(frozen=True)
class SampleResult:
    """One article with the summaries of all sides."""

    task: Task
    summaries: dict[str, Summary]  # by Side.key


@dataclass(frozen=True)
class Score:
    """One side's score of texts, summed over the scored tokens: every token of a text but its first."""

    nll: float = 0.0  # nats
    kl: float = 0.0  # KL(reference || side) in nats
    same_choice: float = 0.0  # number of scored tokens at which side and reference predict the same likeliest token

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.kl + other.kl, self.same_choice + other.same_choice)


@dataclass(frozen=True)
class SideWork:
    """What one side did in a batch."""

    latency_s: float  # wall time of generation alone: no tokenizer, no scoring
    new_tokens: int  # in the summaries, end ids included
    score: Score


@dataclass(frozen=True)
class Batch:
    """A complete batch."""

    samples: list[SampleResult]
    work: dict[str, SideWork]  # by Side.key
    scored_tokens: int  # tokens whose probability was measured


@dataclass(frozen=True)
class SideAgreement:
    """How alike a side and the reference are, over all complete batches."""

    identical_summaries: int
    mean_identical_prefix: float  # tokens
    mean_kl: float  # KL(reference || side) in nats over the scored tokens
    same_first_choice: float  # share of the scored tokens at which both predict the same likeliest token


@dataclass(frozen=True)
class SideFigures:
    """One side's figures over all complete batches."""

    rouge: dict[str, Interval]
    latency_s: float
    new_tokens: int
    tokens_per_s: float
    perplexity: float | None  # over the scored texts; None where it was not asked for
    agreement: SideAgreement | None  # with the reference; None for the reference itself and where there is none


def batches_of(tasks: Sequence[Task], request: Request) -> list[Sequence[Task]]:
    """The tasks by batch, at most request.max_iterations."""
    starts = range(0, len(tasks), request.batch_size)[: request.max_iterations]
    return [tasks[start : start + request.batch_size] for start in starts]


def check_tasks(tasks: Sequence[Task], request: Request, engines: Sequence[EngineSpec], scoring: bool) -> None:
    """Raise ConfigError for an article that an engine cannot take, and for texts that cannot be scored."""
    for batch in batches_of(tasks, request):
        for engine in engines:
            for task in batch:
                if (count := len(task.prompt)) > (limit := engine.build.max_input_len):
                    raise ConfigError(
                        f"article {task.sample.id} makes a prompt of {count} tokens and the engine takes 1 to {limit}; "
                        f"give --max_input_length {limit}, or build with a larger --max_input_len"
                    )
                check_request(engine.model, engine.build, task.prompt, request.sampling, request.output_len)
        if scoring and min(len(task.scored) for task in batch) < 2:
            raise ConfigError("one token has no perplexity; give a larger --max_input_length, or build with one")


def scores_of(sides: Sequence[Side], reference: Side | None, ids: Sequence[int]) -> dict[str, Score]:
    """Every side's score of one text, by Side.key; the logits of two sides at most are held at once."""
    expected = reference.score(ids)[:-1] if reference else None
    scores = {}
    for side in sides:
        if side is reference and expected is not None:
            scores[side.key] = Score(negative_log_likelihood(expected, ids[1:]))
            continue
        logits = side.score(ids)[:-1]
        nll, kl, same = negative_log_likelihood(logits, ids[1:]), 0.0, 0.0
        if expected is not None:
            agreement = agreement_of(reference=expected, other=logits)
            kl, same = len(logits) * agreement.kl, len(logits) * agreement.top1
        scores[side.key] = Score(nll, kl, same)
    return scores


@dataclass
class Evaluation:
    """Runs batches; after an interruption the complete batches remain.

    scoring: whether texts are scored: perplexity was asked for or there is a reference.
    reference: key of the side that the others' agreement is measured with; None or not among the sides: there is none.
    """

    sides: Sequence[Side]
    tasks: Sequence[Task]
    request: Request
    tokenizer: Tokenizer
    rouge: Rouge
    scoring: bool
    reference: str | None = None
    done: list[Batch] = field(default_factory=list)

    def batches(self) -> list[Sequence[Task]]:
        """The tasks by batch."""
        return batches_of(self.tasks, self.request)

    def warm_up(self) -> None:
        """Each side's, untimed, with the longest prompts of all batches: no batch takes more memory."""
        tasks = [task for batch in self.batches() for task in batch]
        longest = sorted((task.prompt for task in tasks), key=len)[-self.request.batch_size :]
        for side in self.sides:
            side.warm_up(longest, self.request.sampling, self.request.output_len)

    def run(self, tasks: Sequence[Task]) -> None:
        """Summarise and score one batch."""
        generated, latency_s = {}, {}
        for side in self.sides:
            start = time.perf_counter()
            prompts = [task.prompt for task in tasks]
            generated[side.key] = side.generate(prompts, self.request.sampling, self.request.output_len)
            latency_s[side.key] = time.perf_counter() - start
        scores = [scores_of(self.sides, self._reference(), task.scored) for task in tasks] if self.scoring else []
        work = {
            key: SideWork(latency_s[key], _count(each), sum((score[key] for score in scores), Score()))
            for key, each in generated.items()
        }
        scored_tokens = sum(len(task.scored) - 1 for task in tasks) if self.scoring else 0
        self.done.append(Batch(self._judge(tasks, generated), work, scored_tokens))

    @property
    def samples(self) -> list[SampleResult]:
        """The articles of all complete batches."""
        return [sample for batch in self.done for sample in batch.samples]

    @property
    def scored_tokens(self) -> int:
        """The number of scored tokens in all complete batches."""
        return sum(batch.scored_tokens for batch in self.done)

    def figures(self, key: str) -> SideFigures:
        """One side's figures; at least one batch is complete."""
        work = [batch.work[key] for batch in self.done]
        latency_s, new_tokens = sum(each.latency_s for each in work), sum(each.new_tokens for each in work)
        nll = sum(each.score.nll for each in work)
        perplexity = _exp(nll / self.scored_tokens) if self.request.eval_ppl else None
        rouge = {kind: interval([each.summaries[key].rouge[kind] for each in self.samples]) for kind in KINDS}
        speed = new_tokens / max(latency_s, 1e-9)
        return SideFigures(rouge, latency_s, new_tokens, speed, perplexity, self._agreement(key))

    def _agreement(self, key: str) -> SideAgreement | None:
        reference = self._reference()
        if reference is None or key == reference.key:
            return None
        pairs = [(sample.summaries[key], sample.summaries[reference.key]) for sample in self.samples]
        score = sum((batch.work[key].score for batch in self.done), Score())
        return SideAgreement(
            sum(ours.ids == theirs.ids for ours, theirs in pairs),
            sum(ours.identical_prefix or 0 for ours, _ in pairs) / len(pairs),
            score.kl / self.scored_tokens,
            score.same_choice / self.scored_tokens,
        )

    def _reference(self) -> Side | None:
        return next((side for side in self.sides if side.key == self.reference), None)

    def _judge(self, tasks: Sequence[Task], generated: dict[str, list[Generation]]) -> list[SampleResult]:
        highlights = [task.sample.highlights for task in tasks]
        summaries = {}
        for key, generations in generated.items():
            texts = [self.tokenizer.decode(each.ids) for each in generations]
            scores = self.rouge.score(texts, highlights)
            expected = generated.get(self.reference) if self.reference and key != self.reference else None
            summaries[key] = [
                Summary(
                    text,
                    each.ids,
                    each.finish_reason,
                    {kind: scores[kind][row] for kind in KINDS},
                    common_prefix(each.ids, expected[row].ids) if expected else None,
                )
                for row, (text, each) in enumerate(zip(texts, generations, strict=True))
            ]
        return [
            SampleResult(task, {key: each[row] for key, each in summaries.items()}) for row, task in enumerate(tasks)
        ]


def _count(generations: Sequence[Generation]) -> int:
    return sum(len(each.ids) + (each.finish_reason == "stop") for each in generations)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)
