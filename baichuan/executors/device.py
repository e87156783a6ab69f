"""Which device runs: what the user says, or else a GPU where PyTorch can use one."""

from __future__ import annotations

import os

import torch

from baichuan.config import DEVICES, require_choice
from baichuan.errors import UnsupportedError
from baichuan.util.nvidia import driver_gpus


def resolve_device(name: str) -> str:
    """cpu or cuda, for one of DEVICES.  Raises UnsupportedError for cuda where PyTorch can use no GPU."""
    require_choice("device", name, DEVICES)
    usable = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if usable else "cpu"
    if name == "cuda" and not usable:
        raise UnsupportedError(f"device cuda needs a GPU and {why_no_gpu()}; use --device cpu")
    return name


def unusable_gpu() -> str | None:
    """Why PyTorch cannot use a GPU that is there; None where it can, where there is none or where it is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if torch.cuda.is_available() or hidden or not (gpus := driver_gpus()):
        return None
    return f"{gpus[0]} is there and {why_no_gpu()}"


def why_no_gpu() -> str:
    """Why PyTorch can use no GPU."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built for the CPU"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no driver, or one that is too old
        return f"PyTorch ({torch.__version__}) sees none ({str(error).splitlines()[0].rstrip('.')})"
    return f"PyTorch ({torch.__version__}) sees none"
