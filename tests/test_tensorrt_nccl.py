"""The communicator that a TensorRT plan is given joins real GPUs."""

import ctypes

import pytest
import torch

from baichuan.executors.tensorrt import nccl
from baichuan.parallel.comm import run_ranks

FLOAT32, SUM = 7, 0  # ncclFloat32, ncclSum


@pytest.mark.multi_gpu
def test_the_capsule_s_communicator_sums_over_the_gpus():
    def body(comm):
        device = torch.device("cuda", comm.rank)
        capsule = nccl.communicator_capsule(comm, device)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        handle = ctypes.c_void_p(get(capsule, b"ncclComm_t"))
        x = torch.arange(1000, device=device, dtype=torch.float32) * (comm.rank + 1)
        stream = torch.cuda.current_stream(device)
        address = ctypes.c_void_p(x.data_ptr())
        library, count = ctypes.CDLL(nccl.LIBRARY), ctypes.c_size_t(x.numel())
        assert not library.ncclAllReduce(
            address, address, count, FLOAT32, SUM, handle, ctypes.c_void_p(stream.cuda_stream)
        )
        stream.synchronize()
        return x.cpu()

    for summed in run_ranks(2, body):
        assert torch.equal(summed, torch.arange(1000) * 3.0)
