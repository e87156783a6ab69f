"""An NCCL communicator in the form that IExecutionContext.set_communicator takes."""

from __future__ import annotations

import ctypes

import torch

from baichuan.errors import UnsupportedError
from baichuan.parallel.comm import Communicator

CAPSULE_NAME = b"ncclComm_t"  # compared by TensorRT; the bytes must outlive the capsule
LIBRARY = "libnccl.so.2"  # PyTorch's own, which is loaded by now


class UniqueId(ctypes.Structure):
    """ncclUniqueId"""

    _fields_ = [("internal", ctypes.c_char * 128)]


def communicator_capsule(comm: Communicator, device: torch.device):
    """A PyCapsule of an ncclComm_t that joins comm's ranks, each on its GPU.  Every rank calls this.

    The communicator lives as long as the process.  Raises UnsupportedError when NCCL is missing or fails.
    """
    torch.cuda.set_device(device)
    try:
        nccl = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise UnsupportedError(f"{LIBRARY} cannot be loaded ({error}); install PyTorch with CUDA") from None
    own = UniqueId()
    if comm.rank == 0:
        _check(nccl, nccl.ncclGetUniqueId(ctypes.byref(own)))
    shared = UniqueId.from_buffer_copy(comm.broadcast_object(bytes(own)))
    handle = ctypes.c_void_p()
    _check(nccl, nccl.ncclCommInitRank(ctypes.byref(handle), comm.world_size, shared, comm.rank))
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new_capsule(handle, CAPSULE_NAME, None)


def _check(nccl, status: int) -> None:
    if status:
        nccl.ncclGetErrorString.restype = ctypes.c_char_p
        reason = nccl.ncclGetErrorString(status).decode()
        raise UnsupportedError(f"NCCL cannot join the ranks ({reason}); set NCCL_DEBUG=WARN to see why")
