"""Data sets of the hub, row by row, and one sentence where there is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from baichuan.errors import ConfigError

CNN_DAILYMAIL = "abisee/cnn_dailymail"
CONFIGS = {CNN_DAILYMAIL: "3.0.0"}  # the configuration to use, for data sets with several
TIMEOUT_S = 20.0


def load_dataset(*args, **settings):
    """datasets.load_dataset, with the library's messages in our log."""
    import datasets

    library = logging.getLogger("datasets")
    for handler in library.handlers[:]:
        library.removeHandler(handler)
    library.propagate = True
    return datasets.load_dataset(*args, **settings)


def hub_rows(name: str, split: str, remedy: str) -> Iterator[dict]:
    """The rows of a split.  Raises ConfigError, whose sentence ends in `remedy`, where they cannot be had."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=TIMEOUT_S)  # load_dataset would try again and again for 20 s
        # Streaming reads what is asked for; offline, the cache can only be read without it.
        yield from load_dataset(name, CONFIGS.get(name), split=split, streaming=not HF_HUB_OFFLINE)
    except Exception as error:  # the library raises many types, for networks, formats and missing names
        raise ConfigError(f"{name} cannot be loaded from the hub ({reason(error)}); {remedy}") from None


def reason(error: Exception) -> str:
    """The error's message without its final full stop."""
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
