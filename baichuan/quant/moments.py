"""What calibration knows of a linear's inputs, and the error that integers leave in its products with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.util.tensor_cores import tensor_cores


@dataclass(frozen=True, eq=False)
class InputMoments:
    """What is known of a linear's inputs x, and of e, the same in the model of floats.

    Raises CheckpointError where x is not finite.
    """

    squares: Tensor  # mean(x xᵀ), [in_features, in_features] float32
    drift: Tensor | None  # mean((e - x) xᵀ), the same; None where the method does not ask for it
    num_tokens: int

    def __post_init__(self):
        if not torch.isfinite(self.squares.diagonal().mean()):
            raise CheckpointError("an activation is not finite (NaN or infinity) on the calibration texts; check both")

    def error(self, left: Tensor) -> float:
        """mean |left x|²: of products with a matrix that is off by `left`, [out_features, in_features]."""
        with tensor_cores():
            return ((left @ self.squares) * left).sum(dtype=torch.float64).item()
