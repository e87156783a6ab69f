"""The executor of TensorRT plans: packed steps become padded runs, tensors are bound by the plan's contract."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.memory import require_device_memory
from baichuan.executors.tensorrt.contract import Contract, TensorSpec
from baichuan.executors.tensorrt.kv_buffers import GrowingBuffers, InPlaceBuffers, kv_buffers
from baichuan.executors.tensorrt.padding import PaddedRun, decode_run, prefill_runs
from baichuan.executors.tensorrt.plan import Plan, open_plan
from baichuan.parallel.comm import Communicator
from baichuan.records import Step
from baichuan.util.files import cache_folder
from baichuan.util.manifest import one_digest

logger = logging.getLogger(__name__)

CONTEXT, GENERATION = 0, 1  # the contract's profiles


def open_tensorrt(path: Path, contract: Contract, comm: Communicator, digests: Sequence[str]) -> TensorRtExecutor:
    """The executor of the plan in `path`, whose digests (util/manifest.py) name its kernel cache.

    Raises what open_plan raises.
    """
    kernels = None
    try:
        kernels = cache_folder() / "tensorrt_rtx" / f"{one_digest(digests)}.kernels"
    except OSError as error:
        logger.info("kernels are compiled again at every start: %s", error)
    return TensorRtExecutor(open_plan(path, contract, comm, kernels), contract)


class TensorRtExecutor:
    """executors.base.RowExecutor over one rank's plan."""

    paged = False

    def __init__(self, plan: Plan, contract: Contract):
        self.plan, self.contract, self.device = plan, contract, plan.device
        self.cache = self._no_cache()

    def reset(self, rows: int, capacity: int) -> None:
        largest = self.contract.profiles[GENERATION].largest("batch")
        if rows > largest or capacity > self.contract.capacity:
            raise UnsupportedError(
                f"{rows} sequences of {capacity} tokens do not fit a plan for {largest} of "
                f"{self.contract.capacity}; ask for less, or build with larger limits"
            )
        self.cache = self._no_cache()  # the old one makes room before memory is asked for
        if self.device.type == "cuda":
            size = self.contract.cache_bytes(rows)
            require_device_memory(size, f"a KV cache of {rows} x {self.contract.capacity} tokens", self.device)
        self.cache = kv_buffers(self.contract, rows, self.device)

    def _no_cache(self) -> InPlaceBuffers | GrowingBuffers:
        return kv_buffers(self.contract, 0, torch.device("cpu"))

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        if step.max_new_tokens == 1 and step.batch_size == step.tokens.shape[0] == step.output_rows.shape[0]:
            return self._run(decode_run(step)).float()
        context = self.contract.profiles[CONTEXT]
        fits = step.batch_size <= context.largest("batch")
        max_new = context.largest("new") if fits else 1
        max_outputs = context.largest("outputs") if fits else step.batch_size
        vocab_size = int(self.contract.outputs[-1].shape[-1])
        logits = torch.empty(step.output_rows.shape[0], vocab_size, device=self.device)
        for run in prefill_runs(step, max_new, max_outputs):
            assert run.destinations is not None, "a prefill's runs say whose outputs they have"
            logits[run.destinations] = self._run(run)[: run.destinations.shape[0]].float()
        return logits

    def _run(self, run: PaddedRun) -> Tensor:
        """Logits of the run's outputs, [outputs, vocab_size] in the plan's logits type."""
        sizes = {"batch": run.batch, "new": run.new, "outputs": run.output_rows.shape[0], **self.cache.sizes(run)}
        given = {"input_ids": run.input_ids, "positions": run.positions, "output_rows": run.output_rows}
        given |= self.cache.inputs(run)
        made = self.cache.output_tensors(run)
        logits = self.contract.outputs[-1]
        made[logits.name] = torch.empty(logits.dims(sizes), dtype=logits.torch_dtype, device=self.device)
        self.plan.select_profile(GENERATION if run.new == 1 else CONTEXT)
        for spec in self.contract.inputs:
            self.plan.bind_input(spec.name, _as_specified(spec, given, sizes))
        for spec in self.contract.outputs:
            self.plan.bind_output(spec.name, _as_specified(spec, made, sizes))
        self.plan.run()
        self.cache.written(run, made)
        return made[logits.name]


def _as_specified(spec: TensorSpec, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    tensor = tensors[spec.name]
    if tensor.shape != spec.dims(sizes) or tensor.dtype != spec.torch_dtype or not tensor.is_contiguous():
        raise AssertionError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}")
    return tensor
