"""ROUGE as a metric of the `evaluate` package, loaded by path: evaluate.load(".../rouge_metric.py") fetches nothing."""

import re

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Unified ideographs with their extensions A to H, and compatibility ideographs.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_TOKEN = re.compile(f"[a-z0-9]+|[{HAN}]")


class WordsAndCharacters(Tokenizer):
    """Runs of a-z and 0-9 in lower case, as rouge_score's own tokenizer without stemming; each Chinese character alone.

    Other characters separate.  On text without Chinese characters it equals rouge_score's own tokenizer.
    """

    def tokenize(self, text):
        return _TOKEN.findall(text.lower())


class Rouge(evaluate.Metric):
    """compute(predictions, references) -> for each of KINDS, the pairs' F-measures in their order, each 0 to 1.

    ROUGE-1 and -2 count common n-grams, ROUGE-L is the longest common subsequence, and ROUGE-Lsum is that of the
    summaries' lines.  Source: Lin, ROUGE: a Package for Automatic Evaluation of Summaries, 2004.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chin-Yew Lin, ROUGE: a Package for Automatic Evaluation of Summaries, 2004",
            inputs_description=WordsAndCharacters.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        scorer = RougeScorer(KINDS, tokenizer=WordsAndCharacters())
        scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        return {kind: [score[kind].fmeasure for score in scores] for kind in KINDS}
