"""What a plan's runtime must know: names, types and shapes of its inputs and outputs, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from baichuan.config import BuildConfig, ModelConfig, QuantConfig
from baichuan.errors import EngineError
from baichuan.executors.memory import KV_DTYPES

OUTPUTS_PER_RUN = 128  # most rows of logits in one run of the context profile; more take several runs
IN_PLACE, GROWING = "in_place", "growing"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.  A dimension is a number, or a name whose size each run chooses."""

    name: str
    dtype: str  # PyTorch's name
    shape: tuple[int | str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def dims(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every name replaced."""
        return tuple(sizes[each] if isinstance(each, str) else each for each in self.shape)


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the sizes (smallest, best, largest) of each named dimension."""

    name: str  # context | generation
    sizes: dict[str, tuple[int, int, int]]

    def largest(self, name: str) -> int:
        return self.sizes[name][2]


@dataclass(frozen=True)
class Contract:
    """A plan's interface, the same for every rank.

    kv_mode in_place: past_* and present_* of a layer share one buffer [batch, heads, capacity, head_dim], row b is
    written from write_index[b] on.  growing: present_* are the new slots behind past_* [past, batch, heads, head_dim];
    key_positions says which position each slot of each row holds, FREE_SLOT where none; slot 0 always holds none.
    """

    module: str
    version: str
    kv_mode: str
    capacity: int  # tokens of one sequence
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...] = ()  # compute capabilities; empty = all that the module supports, or this machine's
    debug: tuple[str, ...] = ()  # tensors that a debug listener receives

    def cache_bytes(self, batch_size: int) -> int:
        """Memory of the KV cache for batch_size sequences."""
        sizes = {"batch": batch_size, "past": self.capacity + 1}
        caches = [spec for spec in self.inputs if spec.name.startswith("past_")]
        return sum(spec.torch_dtype.itemsize * math.prod(spec.dims(sizes)) for spec in caches)

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping) -> Contract:
        """Raises EngineError for anything but what to_json wrote."""
        try:
            specs = {
                key: tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in values[key])
                for key in ("inputs", "outputs")
            }
            profiles = tuple(
                Profile(each["name"], {name: tuple(sizes) for name, sizes in each["sizes"].items()})
                for each in values["profiles"]
            )
            rest: dict[str, Any] = {key: values[key] for key in ("module", "version", "kv_mode", "capacity")}
            rest |= {key: tuple(values[key]) for key in ("targets", "debug")}
        except (KeyError, TypeError) as error:
            raise EngineError(f"the engine's TensorRT contract is incomplete ({error}); build it again") from None
        return Contract(inputs=specs["inputs"], outputs=specs["outputs"], profiles=profiles, **rest)


FREE_SLOT = 1 << 30  # key position of a slot that holds nothing: later than any query


def make_contract(config: ModelConfig, quant: QuantConfig, build: BuildConfig, module: str, version: str) -> Contract:
    """The interface of a plan for these settings."""
    grows = quant.kv_cache != "none"
    heads, head_dim = config.num_heads // build.world_size, config.head_dim
    past: tuple[int | str, ...]
    present: tuple[int | str, ...]
    if grows:
        kv_dtype = str(KV_DTYPES[quant.kv_cache]).removeprefix("torch.")
        past, present = (("past", "batch", heads, head_dim), ("new", "batch", heads, head_dim))
        place = TensorSpec("key_positions", "int32", ("batch", "total"))
    else:
        kv_dtype = config.dtype
        past = present = ("batch", heads, build.max_seq_len, head_dim)
        place = TensorSpec("write_index", "int32", ("batch",))
    names = [f"{kind}.{layer}" for layer in range(config.num_layers) for kind in ("k", "v")]
    return Contract(
        module=module,
        version=version,
        kv_mode=GROWING if grows else IN_PLACE,
        capacity=build.max_seq_len,
        inputs=(
            TensorSpec("input_ids", "int32", ("batch", "new")),
            TensorSpec("positions", "int32", ("batch", "new")),
            place,
            TensorSpec("output_rows", "int32", ("outputs",)),
            *(TensorSpec(f"past_{name}", kv_dtype, past) for name in names),
        ),
        outputs=(
            *(TensorSpec(f"present_{name}", kv_dtype, present) for name in names),
            TensorSpec("logits", build.logits_dtype, ("outputs", config.vocab_size)),
        ),
        profiles=(_context(build), _generation(build)),
    )


def _context(build: BuildConfig) -> Profile:
    rows = build.max_batch_size
    new = build.max_input_len
    if build.max_num_tokens:
        new = min(new, max(1, build.max_num_tokens // rows))
    outputs = max(rows, min(OUTPUTS_PER_RUN, rows * new))
    return _profile("context", build.max_seq_len, (1, rows, rows), (1, new, new), (1, rows, outputs), best_past=1)


def _generation(build: BuildConfig) -> Profile:
    rows, capacity = (1, build.max_rows, build.max_rows), build.max_seq_len
    return _profile("generation", capacity, rows, (1, 1, 1), rows, best_past=min(build.max_input_len, capacity))


def _profile(name: str, capacity: int, batch, new, outputs, best_past: int) -> Profile:
    past = (1, best_past, capacity)  # slot 0 is never in use, so that no input is ever empty
    total = tuple(p + n for p, n in zip(past, new, strict=True))
    return Profile(name, {"batch": batch, "new": new, "outputs": outputs, "past": past, "total": total})
