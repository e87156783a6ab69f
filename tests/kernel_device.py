"""Where the kernel tests run: on the GPU, else in Triton's interpreter.  To be imported before any kernel."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64; infinite where the result is not a number."""
    reference = reference.double().cpu()
    error = float((result.double().cpu() - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def to_device(value):
    """A record of tensors, or a tuple of records, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(map(to_device, value))
    return type(value)(**{k: to_device(v) for k, v in vars(value).items()}) if hasattr(value, "__dict__") else value
