"""One record for each Triton kernel: launching it on a GPU, and compiling it ahead of time where there is none.

Compiling is for the tests: it shows that every kernel compiles for each generation of GPU and fits its shared memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class GemvBlock:
    """How a GEMV is cut up: a program takes block_n rows of the weight, block_k loads of each at a time.  A load is a
    number in gemv.py, a word of four bytes in gemv_int.py.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class KernelSpec:
    """A kernel whose arguments are pointers to inputs, int32 scalars, pointers to outputs, then constexprs.

    Where a constexpr switches an input off, any tensor is passed in its place and is not read.
    """

    kernel: triton.runtime.JITFunction
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]  # each may be written in part, and may be an input too

    @property
    def constants(self) -> tuple[str, ...]:
        pointers_and_scalars = len(self.inputs) + len(self.scalars) + len(self.outputs)
        return tuple(self.kernel.arg_names[pointers_and_scalars:])

    def launch(
        self,
        grid: Sequence[int],
        inputs: Sequence[Tensor],
        scalars: Sequence[int],
        outputs: Sequence[Tensor],
        constants: Mapping[str, object],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        """Run the kernel on the current stream.

        From compute capability 9.0 on it starts while the kernel before it still runs, and waits itself for that one's
        results (primitives.py), which the constant OVERLAP switches on.
        """
        overlap = overlaps(inputs[0].device)
        self.kernel[tuple(grid)](
            *inputs,
            *scalars,
            *outputs,
            **plain_values(constants),
            OVERLAP=overlap,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
            **({"launch_pdl": True} if overlap else {}),
        )

    def compile(
        self,
        pointer_types: Sequence[torch.dtype],
        constants: Mapping[str, object],
        num_warps: int = 4,
        num_stages: int = 3,
        capability: int = 90,
        ones: Collection[str] = (),
    ):
        """The kernel compiled without a GPU: .asm["ptx"], .asm["cubin"], .metadata.

        pointer_types: of the inputs, then of the outputs; pointers and scalars are taken as multiples of 16;
        ones: the scalars that are 1, which become constants, as Triton makes them when it launches
        """
        inputs, outputs = pointer_types[: len(self.inputs)], pointer_types[len(self.inputs) :]
        types = [f"*{TRITON_TYPES[t]}" for t in inputs]
        types += ["constexpr" if name in ones else "i32" for name in self.scalars]
        types += [f"*{TRITON_TYPES[t]}" for t in outputs]
        signature = dict(zip(self.kernel.arg_names, types + ["constexpr"] * len(self.constants), strict=True))
        aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types) if kind != "constexpr"}
        given = {"OVERLAP": capability >= 90} | plain_values(constants) | dict.fromkeys(ones, 1)
        values = {name: given[name] for name in (*ones, *self.constants)}
        source = triton.compiler.ASTSource(self.kernel, signature, values, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=options)


def plain_values(constants: Mapping[str, object]) -> dict[str, object]:
    """The constants with Triton's wrappers taken off."""
    return {name: value.value if isinstance(value, tl.constexpr) else value for name, value in constants.items()}


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel on this device may start while the one before it still runs."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9,)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; without a GPU, those of compute capability 9.0."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache
def processors(device: torch.device) -> int:
    """The GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
