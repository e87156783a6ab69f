"""Data sets of the hub, row by row, and one sentence where there is none."""

from __future__ import annotations

from collections.abc import Iterator

from baichuan.errors import ConfigError
from baichuan.text.rows import reason
from baichuan.util.library_logs import through_our_log

CNN_DAILYMAIL = "abisee/cnn_dailymail"
CONFIGS = {CNN_DAILYMAIL: "3.0.0"}  # the configuration to use, for data sets with several
TIMEOUT_S = 20.0


def hub_rows(name: str, split: str, remedy: str) -> Iterator[dict]:
    """The rows of a split.  Raises ConfigError, whose sentence ends in `remedy`, where they cannot be had."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    through_our_log("datasets", "huggingface_hub")
    try:
        if not HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=TIMEOUT_S)  # load_dataset would try again and again for 20 s
        # Streaming downloads only the rows that are read; the cache, all there is offline, cannot be streamed.
        yield from datasets.load_dataset(name, CONFIGS.get(name), split=split, streaming=not HF_HUB_OFFLINE)
    except Exception as error:  # the library raises many types, for networks, formats and missing names
        raise ConfigError(f"{name} cannot be loaded from the hub ({reason(error)}); {remedy}") from None
