"""Which device runs: what the user says, or else a GPU where PyTorch can use one."""

from __future__ import annotations

import os

import torch

from baichuan.config import DEVICES, require_choice
from baichuan.errors import UnsupportedError
from baichuan.parallel.comm import Communicator, Threads
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


def gpu_of_rank(comm: Communicator) -> torch.device:
    """The rank's own GPU; ranks that are threads of one process share those that there are.

    Raises UnsupportedError where the machine has fewer GPUs than ranks.
    """
    count = torch.cuda.device_count()
    if isinstance(comm, Threads):
        return torch.device("cuda", comm.rank % count)
    if comm.local_size > count:
        raise UnsupportedError(
            f"{comm.local_size} ranks need a GPU each and this machine has {count}; "
            "use more GPUs, build with a smaller --world_size, or run on the CPU with --device cpu"
        )
    return torch.device("cuda", comm.local_rank)


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
