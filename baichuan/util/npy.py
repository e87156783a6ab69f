"""NumPy's .npy format, read without evaluating its header: a shape is believed only if the file is as long as it says.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # how many bytes the header's length takes, by major version
MAX_HEADER_BYTES = 4096
MAX_DIMENSIONS = 8
FIELDS = {  # each field of the header, as every writer spells it
    "descr": re.compile(r"""['"]descr['"]\s*:\s*['"]([<>|=][biuf]\d{1,2})['"]"""),
    "fortran_order": re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)"""),
    "shape": re.compile(r"""['"]shape['"]\s*:\s*\(([\d\s,]*)\)"""),
}


@dataclass(frozen=True)
class Header:
    """What a file says of its array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int  # where the array's first byte is in the file

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(file: BinaryIO) -> Header:
    """The header of a file of numbers or booleans, of which `file` is at the start.  Raises ValueError."""
    start = file.read(8)
    if start[:6] != MAGIC or len(start) < 8 or start[6] not in LENGTH_BYTES:
        raise ValueError("it is no .npy file")
    width = LENGTH_BYTES[start[6]]
    length = int.from_bytes(file.read(width), "little")
    content = file.read(min(length, MAX_HEADER_BYTES + 1))
    if not len(content) == length <= MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes")
    found = {name: pattern.search(content.decode("latin-1")) for name, pattern in FIELDS.items()}
    descr, order, sizes = (match[1] if (match := found[name]) else None for name in FIELDS)
    if descr is None or order is None or sizes is None:
        raise ValueError("its header does not describe an array of numbers")
    numbers = [each.strip() for each in sizes.split(",") if each.strip()]
    if len(numbers) > MAX_DIMENSIONS or not all(each.isdigit() and len(each) < 20 for each in numbers):
        raise ValueError("its shape is damaged")
    try:
        dtype = np.dtype(descr)
    except TypeError:
        raise ValueError(f"it has an unknown type {descr}") from None
    return Header(dtype, tuple(map(int, numbers)), order == "True", len(start) + width + length)


def read_array(file: BinaryIO, max_elements: int) -> np.ndarray:
    """The array of a whole .npy file.  Raises ValueError for one of more elements, and for what read_header refuses."""
    header = read_header(file)
    if header.elements > max_elements:
        raise ValueError(f"its shape {header.shape} has more than {max_elements} elements")
    size = header.elements * header.dtype.itemsize
    content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"its shape {header.shape} does not fit the file's size")
    flat = np.frombuffer(content, header.dtype)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def write_array(write: Callable[[bytes], object], array: np.ndarray) -> None:
    """Write the array piece by piece with write(bytes), whose errors, unlike those of np.save to a file, say why."""
    np.lib.format.write_array(_Writer(write), array, allow_pickle=False)


@dataclass(frozen=True)
class _Writer:
    write: Callable[[bytes], object]
