"""Texts for calibration, from a local file or from the hub."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from baichuan.errors import ConfigError
from baichuan.tokenizer import Tokenizer, check_ids

DEFAULT_DATASET = "abisee/cnn_dailymail"
HUB_CONFIGS = {DEFAULT_DATASET: "3.0.0"}  # data sets with several configurations: the one to use
HUB_TIMEOUT_S = 20.0
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
TEXT_COLUMNS = ("article", "text", "content")  # in order of preference; else the first column of text


def read_texts(dataset: str, count: int, flag: str) -> list[str]:
    """The first `count` texts that are not blank.  flag: what a message calls the data set's command-line flag.

    dataset: a json, jsonl, csv, parquet or txt file (one text a line), or a hub id.  Raises ConfigError.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = Path(dataset)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ConfigError(f"{flag} {dataset} does not exist; name a json, jsonl, csv, parquet or txt file")
        arguments, named = (BUILDERS[path.suffix],), {"data_files": str(path), "streaming": True}
    elif path.exists():
        raise ConfigError(f"{flag} {dataset} is no json, jsonl, csv, parquet or txt file; name one of these")
    else:
        arguments, named = (dataset, HUB_CONFIGS.get(dataset)), {"streaming": not HF_HUB_OFFLINE}
    local = "data_files" in named
    try:
        if not local and not HF_HUB_OFFLINE:
            HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_S)  # load_dataset would try again and again for 20 s
        rows = load_dataset(*arguments, split="train", **named)
        texts = list(islice((text for text in map(_text_of, rows) if text.strip()), count))
    except ConfigError:
        raise
    except Exception as error:  # the library raises many types, for networks, formats and missing names
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if local:
            raise ConfigError(f"{flag} {dataset} cannot be read ({reason}); repair it or name another file") from None
        raise ConfigError(
            f"the data set {dataset} cannot be loaded from the hub ({reason}); "
            f"give {flag} a local json, jsonl, csv, parquet or txt file"
        ) from None
    if not texts:
        raise ConfigError(f"{flag} {dataset} holds no text; name a data set that does")
    return texts


def encode_texts(texts: list[str], tokenizer: Tokenizer, max_length: int, vocab_size: int) -> list[list[int]]:
    """Each text's first `max_length` tokens.  Raises ConfigError for an id that the model does not have."""
    samples = [tokenizer.encode(text)[:max_length] for text in texts]
    for sample in samples:
        check_ids(sample, vocab_size, "a calibration text")
    return [sample for sample in samples if sample]


def _text_of(row: dict) -> str:
    for column in (*TEXT_COLUMNS, *row):
        if isinstance(row.get(column), str):
            return row[column]
    raise ConfigError(f"the data set has no column of text, only {', '.join(map(str, row))[:100]}; name another one")
