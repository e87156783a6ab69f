"""What is asked of a conversion."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from baichuan.config import ModelConfig, WeightOnly, require_choice, require_range
from baichuan.errors import ConfigError

if TYPE_CHECKING:
    from baichuan.weights.source import Checkpoint

METHODS = ("gptq", "awq")  # methods that find weight-only integers


@dataclass(frozen=True)
class ConvertRequest:
    """One conversion."""

    out_dir: Path  # the folder itself is out_dir/{tp_size}-gpu
    model: ModelConfig
    open_checkpoint: Callable[[], Checkpoint]  # picklable: each writing process calls it
    tp_size: int = 1
    processes: int = min(os.cpu_count() or 1, 16)
    # SmoothQuant's strength, auto = each linear's best in each mode; None: 8-bit outputs for the KV cache alone
    alpha: float | Literal["auto"] | None = None
    storage_type: str = "fp32"
    text_folder: Path | None = None  # its tokenizer and generation settings are copied
    device: str = "auto"  # calibrates; one of device.DEVICES
    weight_only: WeightOnly | None = None  # the integers to be found, if any
    method: str = "gptq"  # how the integers are found; one of METHODS

    def __post_init__(self):
        require_range("tensor parallelism", self.tp_size, 1, 1024)
        require_range("processes", self.processes, 1, 1024)
        if isinstance(self.alpha, float | int) and not 0 <= self.alpha <= 1:
            raise ConfigError(f"SmoothQuant's alpha {self.alpha} is outside [0, 1]; 0.5 to 0.8 is a good choice")
        if self.alpha is not None and self.weight_only:
            raise ConfigError(
                f"{self.weight_only.precision} weights are found for the model as it is and SmoothQuant changes it; "
                "convert twice, into two folders"
            )
        require_choice("weight_only_method", self.method, METHODS)
        if self.method == "awq" and self.weight_only and self.weight_only.precision == "int8":
            raise ConfigError("--weight_only_method awq finds INT4 weights and INT8 is asked for; use gptq")
        self.model.check_tensor_parallel(self.tp_size)

    @property
    def by_mode(self) -> bool:
        """Build.py smooths the weights, for its mode; else they are smoothed when they are written, if at all."""
        return self.alpha == "auto"

    @property
    def fixed_alpha(self) -> float | None:
        return None if self.alpha == "auto" else self.alpha

    @property
    def folder(self) -> Path:
        return self.out_dir / f"{self.tp_size}-gpu"
