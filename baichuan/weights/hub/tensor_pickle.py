"""Reading the pickle in a .bin file by an interpreter of only the opcodes that a checkpoint needs: no code runs, and
time and memory are bounded by the size of the file."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import torch

MAX_OPCODES = 1 << 20  # a 13B checkpoint has 12 thousand
MAX_DIMENSIONS = 8

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_TYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}  # types without a storage class
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class ForeignContent(Exception):
    """The pickle holds more than tensors by name."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it."""

    key: str  # name of the archive's record that holds its elements
    dtype: torch.dtype
    record_elements: int
    offset: int  # place of its first element in the record
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        whole = (self.record_elements, self.offset, *self.shape, *self.stride)
        if not all(type(number) is int and number >= 0 for number in whole) or len(self.shape) != len(self.stride):
            raise ValueError("a tensor's shape is damaged")
        steps = (size - 1 for size in self.shape)
        last = self.offset + sum(step * stride for step, stride in zip(steps, self.stride, strict=True))
        if 0 not in self.shape and last >= self.record_elements:
            raise ValueError(f"a tensor of shape {self.shape} exceeds its record of {self.record_elements} elements")


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


def read_tensor_pickle(content: bytes) -> Any:
    """Dicts, lists and tuples of numbers, text and StoredTensor.

    Raises ForeignContent for anything else, and ValueError, IndexError, KeyError or TypeError for damage.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count > MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES} steps")
        match opcode.name:
            case "STOP":
                (result,) = stack
                return result
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _TUPLES:
                stack.append(tuple(_popped(stack, _TUPLES[name])))
            case "TUPLE":
                stack.append(tuple(_popped_to_mark(stack)))
            case "GLOBAL":
                stack.append(_Global(*argument.split(" ", 1)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_called(stack.pop(), arguments))
            case "BUILD":
                stack.pop()  # an OrderedDict's _metadata
            case "APPEND":
                _container(stack[-2], list).append(stack.pop())
            case "APPENDS":
                items = _popped_to_mark(stack)
                _container(stack[-1], list).extend(items)
            case "SETITEM":
                items = _popped(stack, 2)
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = _popped_to_mark(stack)
                _set_items(stack[-1], items)
            case name:
                raise ForeignContent(name)
    raise ValueError("it has no end")


def _popped(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    del stack[-count:]
    return items


def _popped_to_mark(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, which leaves the stack too."""
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
    return _popped(stack, len(stack) - place)[1:]


def _container(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands in place of a {kind.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):  # the hash of a nested tuple can take for ever
            raise ForeignContent(f"a key of type {type(key).__name__}")
        _container(target, dict)[key] = value


def _storage(identity: Any) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements of a record."""
    kind, storage, key, _, elements = identity
    if kind != "storage" or type(key) is not str or type(storage) is not _Global:
        raise ValueError("a record's description is damaged")
    if storage.module not in ("torch", "torch.storage") or storage.name not in _STORAGES:
        raise ForeignContent("a record of another type")
    return key, _STORAGES[storage.name], elements


def _called(function: Any, arguments: Any) -> Any:
    """The value of one of the few functions that a checkpoint calls."""
    match function:
        case _Global("collections", "OrderedDict") if arguments == ():
            return {}
        case _Global("torch", "Size"):
            (sizes,) = arguments
            return _sizes(sizes)
        case _Global("torch._utils", "_rebuild_parameter") if type(arguments[0]) is StoredTensor:
            return arguments[0]
        case _Global("torch._utils", "_rebuild_tensor_v2"):
            record, offset, shape, stride = arguments[:4]
            key, dtype, elements = record
            return StoredTensor(key, dtype, elements, offset, _sizes(shape), _sizes(stride))
        case _Global("torch._utils", "_rebuild_tensor_v3"):
            (key, _, size), offset, shape, stride, _, _, kind = arguments[:7]
            if type(kind) is not _Global or kind.module != "torch" or kind.name not in _TYPES:
                raise ForeignContent("a tensor of another type")
            dtype = _TYPES[kind.name]
            return StoredTensor(key, dtype, size // dtype.itemsize, offset, _sizes(shape), _sizes(stride))
        case _:
            raise ForeignContent("a call of another function")


def _sizes(value: Any) -> tuple[int, ...]:
    if len(_container(value, tuple)) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
    return value
