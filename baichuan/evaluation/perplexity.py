"""The perplexity of a text file: every side scores the same windows of it, and nothing is generated."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan.errors import ConfigError
from baichuan.evaluation.sides import Side
from baichuan.evaluation.summary import Score, scores_of
from baichuan.evaluation.text_table import table
from baichuan.evaluation.wording import shown
from baichuan.text.tokenizer import Tokenizer
from baichuan.util.files import atomic_path, read_at_most
from baichuan.util.progress import Progress

MAX_BYTES = 8 << 20  # SentencePiece takes 60 bytes for each
RESULTS_NAME = "perplexity.json"


@dataclass(frozen=True)
class Windows:
    """Consecutive pieces of a text, each scored alone: its first token is given, the others are judged."""

    source: str
    ids: list[list[int]]
    all: int  # windows of the whole text

    @property
    def scored_tokens(self) -> int:
        return sum(len(each) - 1 for each in self.ids)


def read_windows(path: Path, tokenizer: Tokenizer, size: int, most: int) -> Windows:
    """The first `most` windows of `size` tokens of the file; the last of a text may be shorter.

    Every character counts as text.  Raises ConfigError for a file that cannot be read or has no two tokens.
    """
    try:
        text = read_at_most(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"dataset_path {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid UTF-8 at byte {error.start}; convert it to UTF-8") from None
    if size < 2:
        raise ConfigError("one token has no perplexity; give a larger --max_input_length, or build with one")
    ids = tokenizer.encode_literal(text)
    found = [ids[start : start + size] for start in range(0, len(ids), size)]
    found = [each for each in found if len(each) > 1]
    if not found:
        raise ConfigError(f"{path} has fewer than two tokens, which have no perplexity; give a longer text")
    return Windows(str(path), found[:most], len(found))


def score_windows(sides: Sequence[Side], reference: Side | None, windows: Windows) -> dict[str, Score]:
    """Every side's score of all windows, by Side.key.  reference: whom the others' agreement is measured with."""
    totals = {side.key: Score() for side in sides}
    with Progress("scoring", len(windows.ids), "window") as progress:
        for ids in windows.ids:
            for key, score in scores_of(sides, reference, ids).items():
                totals[key] += score
            progress.advance()
    return totals


def results(
    sides: Sequence[Side], reference: Side | None, windows: Windows, totals: dict[str, Score], settings: dict[str, Any]
) -> dict[str, Any]:
    """Every figure as JSON values; an infinite perplexity is text."""
    tokens, rows = windows.scored_tokens, []
    for side in sides:
        total = totals[side.key]
        other = reference is not None and side is not reference
        mean = total.nll / tokens
        rows.append(
            {
                "key": side.key,
                "label": side.label,
                **side.facts,
                "perplexity": math.exp(mean) if mean < 700 else "inf",
                "mean_kl": total.kl / tokens if other else None,
                "same_first_choice": total.same_choice / tokens if other else None,
            }
        )
    counts = {"windows": len(windows.ids), "all_windows": windows.all, "scored_tokens": tokens}
    return {"text": windows.source, **counts, "sides": rows, "settings": settings}


def text_of(values: dict[str, Any]) -> str:
    """What the terminal shows of results()."""
    rows = [
        [
            side["label"],
            shown(side["perplexity"], ".4f"),
            shown(side["mean_kl"], ".2e"),
            shown(None if side["same_first_choice"] is None else 100 * side["same_first_choice"], ".2f"),
        ]
        for side in values["sides"]
    ]
    of = "" if values["windows"] == values["all_windows"] else f" of {values['all_windows']} (--max_ite scores more)"
    head = f"{values['text']}: {values['scored_tokens']} tokens in {values['windows']} windows{of}"
    return f"{head}\n{table(['', 'perplexity', 'KL to HF, nats', 'same first choice, %'], rows)}"


def save(values: dict[str, Any], folder: Path) -> Path:
    """Write results() to the folder."""
    path = folder / RESULTS_NAME
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
