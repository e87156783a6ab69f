"""What is asked of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from baichuan.config import SamplingConfig, require_range
from baichuan.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """The settings that all sides share."""

    sampling: SamplingConfig
    batch_size: int = 1
    max_iterations: int = 20  # batches
    output_len: int = 100  # new tokens at most
    max_input_length: int = 923  # tokens; of a longer prompt the last ones are kept
    eval_ppl: bool = False

    def __post_init__(self):
        require_range("batch_size", self.batch_size, 1, 65536)
        require_range("max_ite", self.max_iterations, 1, 1 << 24)
        require_range("output_len", self.output_len, 1, 1 << 20)
        require_range("max_input_length", self.max_input_length, 1, 1 << 20)
        beams, top_k = self.sampling.num_beams, self.sampling.top_k
        if beams > 1 and top_k != 1:
            raise ConfigError(f"num_beams {beams} searches and does not sample; leave --top_k {top_k} out")
