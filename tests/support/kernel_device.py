"""Where the kernel tests run: on the GPU, else in Triton's interpreter.  To be imported before any kernel."""

import os
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
MARKS = [pytest.mark.cuda] if DEVICE.type == "cuda" else []  # the kernels' tests have them, for `make test-cuda`


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64; infinite where the result is not a number."""
    reference = reference.double().cpu()
    error = float((result.double().cpu() - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def to_device(value, device=DEVICE):
    """A tensor, a record of tensors, or a tuple of either, on the device; any other value stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(each, device) for each in value)
    if is_dataclass(value):
        return replace(value, **{each.name: to_device(getattr(value, each.name), device) for each in fields(value)})
    return value
