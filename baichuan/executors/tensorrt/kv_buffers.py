"""executors.base.RowCache of a TensorRT plan, in the two forms that a network can have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.tensorrt.contract import FREE_SLOT, IN_PLACE, Contract, TensorSpec
from baichuan.executors.tensorrt.padding import PaddedRun

ALIGNMENT = 256  # bytes; every address that TensorRT is given is a multiple


def kv_buffers(contract: Contract, batch_size: int, device: torch.device) -> InPlaceBuffers | GrowingBuffers:
    """Room for batch_size sequences of contract.capacity tokens."""
    return (InPlaceBuffers if contract.kv_mode == IN_PLACE else GrowingBuffers)(contract, batch_size, device)


def kv_names(contract: Contract) -> dict[str, str]:
    """Each cache output's input: present_k.0 -> past_k.0."""
    return {
        spec.name: spec.name.replace("present_", "past_", 1)
        for spec in contract.outputs
        if spec.name.startswith("present_")
    }


class InPlaceBuffers:
    """A buffer [batch, heads, capacity, head_dim] for each input, which is the output too."""

    def __init__(self, contract: Contract, batch_size: int, device: torch.device):
        self.contract, self.batch_size = contract, batch_size
        self.outputs = kv_names(contract)
        specs = {spec.name: spec for spec in contract.inputs}
        # Zeros, because unwritten slots get the attention weight 0, and 0 * NaN is NaN.
        self.buffers = {
            name: torch.zeros(specs[name].dims({"batch": batch_size}), dtype=specs[name].torch_dtype, device=device)
            for name in self.outputs.values()
        }

    def sizes(self, run: PaddedRun) -> dict[str, int]:
        """The dimensions that the cache adds to a run's.  Raises UnsupportedError where it would not fit."""
        if run.most_tokens > self.contract.capacity:
            raise _too_long(run.most_tokens, self.contract.capacity)
        return {}

    def inputs(self, run: PaddedRun) -> dict[str, Tensor]:
        caches = {name: buffer[: run.batch] for name, buffer in self.buffers.items()}
        return {"write_index": run.write_index, **caches}

    def output_tensors(self, run: PaddedRun) -> dict[str, Tensor]:
        return {name: self.buffers[past][: run.batch] for name, past in self.outputs.items()}

    def written(self, run: PaddedRun, outputs: Mapping[str, Tensor]) -> None:
        """Called after a run; the buffers hold the new tokens already."""

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        for buffer in self.buffers.values():
            buffer[: parents.shape[0]] = buffer[parents]

    def truncate(self, row: int, length: int) -> None:
        """Nothing moves: the next run writes from write_index on, and the network masks positions after a query's."""


class GrowingBuffers:
    """Slots [slots, batch, heads, head_dim], filled one run after another.

    A run takes the same new slots in every row, so that its padding leaves slots free in the shorter rows.
    key_positions [batch, slots] holds each slot's position, or FREE_SLOT, here -.  A prompt of three tokens and one of
    one token, then a decode step:

        row 0:  -  0 1 2  3
        row 1:  -  0 - -  1

    Slot 0 is never used, because TensorRT's past input must not be empty.  When the slots are used up, each row's
    tokens are moved together (_close_gaps).
    """

    def __init__(self, contract: Contract, batch_size: int, device: torch.device):
        self.contract, self.batch_size, self.used = contract, batch_size, 1
        self.outputs = kv_names(contract)
        self.specs: dict[str, TensorSpec] = {spec.name: spec for spec in contract.inputs}
        self.slots = contract.capacity + 1
        sizes = {"past": self.slots, "batch": batch_size}
        self.buffers = {  # flat, because the slots of a smaller batch lie closer together
            name: torch.zeros(self.specs[name].dims(sizes), dtype=torch.int8, device=device).flatten()
            for name in self.outputs.values()
        }
        self.key_positions = torch.full((batch_size, self.slots), FREE_SLOT, dtype=torch.int32, device=device)
        self.batch = batch_size  # rows of the slots in use

    def sizes(self, run: PaddedRun) -> dict[str, int]:
        if self.used == 1:
            self.batch = run.batch
        if run.batch != self.batch:
            raise AssertionError(f"the cache holds {self.batch} rows and the run has {run.batch}")
        if self.used + run.new > self.slots:
            self._close_gaps()
        if self.used + run.new > self.slots:
            raise _too_long(self.used + run.new - 1, self.contract.capacity)
        return {"past": self.used, "total": self.used + run.new}

    def inputs(self, run: PaddedRun) -> dict[str, Tensor]:
        positions = self.key_positions[: run.batch]
        positions[:, self.used : self.used + run.new] = run.key_positions
        total = positions[:, : self.used + run.new].contiguous()
        return {"key_positions": total, **{name: self._typed(name)[: self.used] for name in self.buffers}}

    def output_tensors(self, run: PaddedRun) -> dict[str, Tensor]:
        tensors = {}
        for name, past in self.outputs.items():
            slots = self._typed(past)[self.used : self.used + run.new]
            aligned = slots.data_ptr() % ALIGNMENT == 0
            tensors[name] = slots if aligned else torch.empty_like(slots)
        return tensors

    def written(self, run: PaddedRun, outputs: Mapping[str, Tensor]) -> None:
        """Called after a run, whose slots become part of the past."""
        for name, past in self.outputs.items():
            slots = self._slots(past, run.batch)[self.used : self.used + run.new]
            if slots.data_ptr() != outputs[name].data_ptr():
                slots.copy_(outputs[name].view(torch.int8))
        self.used += run.new

    @torch.inference_mode()
    def reorder(self, parents: Tensor) -> None:
        for name in self.buffers:
            rows = self._slots(name, self.batch)[: self.used][:, parents]
            self._slots(name, parents.shape[0])[: self.used] = rows
        self.key_positions[: parents.shape[0]] = self.key_positions[parents]
        self.batch = parents.shape[0]

    @torch.inference_mode()
    def truncate(self, row: int, length: int) -> None:
        positions = self.key_positions[row]
        positions[positions >= length] = FREE_SLOT

    def _typed(self, name: str) -> Tensor:
        return self._slots(name, self.batch).view(self.specs[name].torch_dtype)

    def _close_gaps(self) -> None:
        """Move each row's tokens together, in the order of their positions, behind slot 0."""
        positions = self.key_positions[: self.batch, : self.used]
        order = positions[:, 1:].argsort(dim=1, stable=True) + 1  # [batch, used - 1], free slots last
        rows = torch.arange(self.batch, device=order.device)
        for name in self.buffers:
            slots = self._slots(name, self.batch)[: self.used]
            slots[1:] = slots[order.T, rows]
        positions[:, 1:] = positions.gather(1, order)
        self.used = 1 + int((positions != FREE_SLOT).sum(1).max())

    def _slots(self, name: str, batch: int) -> Tensor:
        """[slots, batch, heads, head_dim] int8, whatever type the bytes stand for: they are only moved here."""
        shape = self.specs[name].dims({"past": self.slots, "batch": batch})
        return self.buffers[name][: torch.Size(shape).numel()].view(shape)


def _too_long(tokens: int, capacity: int) -> UnsupportedError:
    return UnsupportedError(
        f"a sequence of {tokens} tokens, padding included, does not fit the plan's KV cache of {capacity}; "
        "ask for less, or build with a larger --max_input_len or --max_output_len"
    )
