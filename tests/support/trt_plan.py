"""What a TensorRT-RTX plan says about itself: which kernels run, and what the matrix products multiply.

A plan keeps its compiled programs as text between the binaries: `tensor={... name="x" ... region="r" ... type=half }`,
`fully_connected={... input={"x" ...} ...}` for a library product, `runtime_fusion={ name=__myl_CastMulCastFc
input_args={...} ...}` for a product fused with what is around it, `function={ name=... }` for any other kernel.
Beside each program lies the graph that it was compiled from, whose tensors have no region; it is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^ *((?:\w*_)?tensor|fully_connected|runtime_fusion|function)=\{(.*)$", re.MULTILINE)
INPUTS = re.compile(r" input(?:_args)?=\{([^}]*)\}")
ATTENTION = re.compile(r"_(?:gemm|gemv)_mha_v\d|fmha_v\d")
SOFTMAX = re.compile(r"MaxrSubExp")


@dataclass(frozen=True)
class CompiledPlan:
    """Counts over both optimisation profiles."""

    products: Counter  # by product()'s results
    attention: Counter  # fused attention kernels by name
    softmax: int  # kernels of a decomposed attention


def read_plan(path: Path) -> CompiledPlan:
    products, attention, softmax = Counter(), Counter(), 0
    types: dict[str, str] = {}
    placed: set[str] = set()  # tensors with a region
    for call, line in LINE.findall(path.read_bytes().decode("latin1")):
        name = re.search(r' ?name="?([^" ]*)', line)[1]
        if call.endswith("tensor"):
            types[name] = re.search(r" type=(\w+)", line)[1]
            placed.discard(name) if ' region="" ' in line else placed.add(name)
        elif call == "function":
            attention.update(ATTENTION.findall(name))
            softmax += bool(SOFTMAX.search(name))
        elif call == "fully_connected" or "Fc" in name:
            names = re.findall(r'"([^"]*)"', INPUTS.search(line)[1])
            weights = [types[each] for each in names if each.endswith("_dconst") and each in placed]
            if weights:
                products[product(call, name, weights, types[names[0]])] += 1
    return CompiledPlan(products, attention, softmax)


def product(call: str, kernel: str, constants: list[str], activation: str) -> tuple[str, str, str]:
    """(library, or the fused kernel's name; type of the weight; type of the activation)"""
    weight = next((kind for kind in constants if kind in ("int8", "int4", "fp8_e4m3")), constants[0])
    return "library" if call == "fully_connected" else kernel, weight, activation
