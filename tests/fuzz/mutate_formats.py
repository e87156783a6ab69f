"""Damage that keeps a file's format, so that later checks see it.  Every mutator: (chance, content) -> content."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
from copy import deepcopy
from random import Random
from typing import Any

from tests.fuzz import mutate_bytes as damage
from tests.fuzz.mutate_archives import NPZ, TORCH, Mutator, npy
from tests.fuzz.mutate_protobuf import tokenizer
from tests.fuzz.mutate_tables import parquet

INTEGERS = [-1, 0, 1, 2, 3, 5, 255, 4096, 1 << 24, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(1 << 63)]
FLOATS = [0.0, -0.0, 1.5, -1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "U16", "F4", "C64", "", "F999", 3, None]


def json_value(chance: Random, value: Any) -> Any:
    """Something in the place of a JSON value."""
    others = [
        None,
        True,
        False,
        [],
        {},
        [value],
        {"a": value},
        str(value),
        chance.choice(INTEGERS),
        chance.choice(FLOATS),
    ]
    others += [chance.choice(damage.TEXTS), chance.choice(INTEGERS), [[value]] * 3, chance.choice(damage.TEXTS)]
    return chance.choice(others)


def json_tree(chance: Random, values: Any) -> Any:
    """One change somewhere in a tree of JSON values; values itself is changed where it is a container."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(values)
    if not places:
        return json_value(chance, values)
    parent, key = chance.choice(places)
    match chance.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[chance.choice(damage.TEXTS)] = parent.pop(key)
        case 2:
            other, from_there = chance.choice(places)
            parent[key] = deepcopy(other[from_there])  # a copy: no value is within itself
        case 3 if isinstance(parent, list):
            parent.insert(key, json_value(chance, parent[key]))
        case 4 if isinstance(parent[key], int | float):
            parent[key] = parent[key] * chance.choice((-1, 2, 0.5, 3)) + chance.choice((-1, 0, 1))
        case _:
            parent[key] = json_value(chance, parent[key])
    return values


def dumped(values: Any) -> bytes:
    try:
        return json.dumps(values).encode()
    except (ValueError, RecursionError):  # a value within itself
        return b"{}"


def json_document(chance: Random, content: bytes) -> bytes:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return damage.flip_bits(chance, content)
    match chance.randrange(10):
        case 0 if not chance.randrange(8):  # many keys, and one of them twice
            names = b"".join(b'"%x":0,' % number for number in range(chance.choice((1000, 80_000))))
            return content.replace(b"{", b"{" + names + b'"0":0,', 1)
        case 0:  # a key twice
            return content.replace(b"{", b'{"%s": %d, ' % (_some_key(chance, content), chance.choice(INTEGERS)), 1)
        case 1:  # deep
            depth = chance.choice((10, 100, 990, 1100, 100_000))
            return re.sub(rb":\s*[^,{}\[\]]+", b": " + b"[" * depth + b"]" * depth, content, count=1)
        case _:
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                values = json_tree(chance, values)
            return dumped(values)


def _some_key(chance: Random, content: bytes) -> bytes:
    return chance.choice(re.findall(rb'"(\w+)"\s*:', content) or [b"a"])


def json_lines(chance: Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    place = chance.randrange(len(lines))
    lines[place] = json_document(chance, lines[place])
    return b"\n".join(lines)


def json_cells(chance: Random, content: bytes) -> bytes:
    """A cell of a CSV file that is JSON; a line where none is."""
    try:
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except (ValueError, csv.Error):
        rows = []
    if not (places := [(row, i) for row in rows for i, cell in enumerate(row) if cell.startswith(("[", "{"))]):
        return lines(chance, content)
    row, i = chance.choice(places)
    row[i] = json_document(chance, row[i].encode()).decode(errors="surrogateescape")
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode(errors="surrogateescape")


WIDTHS = [("F64", "I64", "U64"), ("F32", "I32", "U32"), ("F16", "BF16", "I16", "U16"), ("I8", "U8", "BOOL", "F8_E4M3")]
ENDS = [
    "bias",
    "SCB",
    "g_idx",
    "qzeros",
    "weight_zero_point",
    "weight.absmax",
    "lora_A.weight",
    "lora_magnitude_vector",
]


def safetensors_entry(chance: Random, content: bytes) -> bytes:
    """A tensor that a reader of the format accepts, but of another shape, type or name."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        name = chance.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        width = (stop - start) // max(1, math.prod(shape))
        match chance.randrange(5):
            case 0:
                kinds = next(kinds for kinds in WIDTHS if entry["dtype"] in kinds)
                entry["dtype"] = chance.choice(kinds)
            case 1:
                entry["shape"] = chance.choice(([*shape, 1], [1, *shape], [math.prod(shape)], shape[1:] + shape[:1]))
            case 2:
                header = {name: entry | {"shape": [], "data_offsets": [0, width]}}
                content = content[: 8 + size + width]
            case 3:
                header[name.rpartition(".")[0] + "." + chance.choice(ENDS)] = header.pop(name)
            case 4:
                number = math.prod(shape)
                entry |= {"shape": [number * width], "dtype": "U8"}
        packed = dumped(header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration):
        return safetensors(chance, content)
    return len(packed).to_bytes(8, "little") + packed + content[8 + size :]


def safetensors(chance: Random, content: bytes) -> bytes:
    """The header, and sometimes its length."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        entry = header[chance.choice([name for name in header if name != "__metadata__"])]
        shape, offsets = entry["shape"], entry["data_offsets"]
        match chance.randrange(9):
            case 0:
                entry["dtype"] = chance.choice(DTYPES)
            case 1 if shape:
                shape[chance.randrange(len(shape))] = chance.choice(INTEGERS)
            case 2:
                shape.append(chance.choice((0, 1, 2, -1, 1 << 40)))
            case 3:
                offsets[chance.randrange(len(offsets))] += chance.choice((-8, -2, -1, 1, 2, 8, 1 << 40, 1 << 63))
            case 4:
                entry["shape"] = shape[::-1] if chance.randrange(2) else [math.prod(shape)]
            case 5:
                header["__metadata__"] = json_value(chance, {"format": "pt"})
            case 6 if not chance.randrange(damage.LARGE):
                header |= {f"x{number}": entry for number in range(200_000)}
            case _:
                header = json_tree(chance, header)
        packed = dumped(header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        packed = json_document(chance, content[8 : 8 + size])
    length = chance.choice((0, 1, 8, 1 << 32, (1 << 64) - 1)) if not chance.randrange(20) else len(packed)
    return length.to_bytes(8, "little") + packed + content[8 + size :]


def numbers_in_data(chance: Random, content: bytes) -> bytes:
    """A NaN, an infinity or an extreme number among the numbers at the file's end, which are aligned."""
    form, values = chance.choice((("<f", FLOATS), ("<e", [math.nan, math.inf, -65504.0, 0.0]), ("<i", [-1, 2**31 - 1])))
    value, size = chance.choice(values), struct.calcsize(form)
    try:
        packed = struct.pack(form, value)
    except OverflowError:
        packed = b"\xff" * size
    start = chance.randrange(max(1, len(content) // size)) * size + len(content) % size
    return content[:start] + packed + content[start + size :]


def lines(chance: Random, content: bytes) -> bytes:
    """Lines of text: one removed, repeated, moved, or one of its cells replaced."""
    rows = content.split(b"\n")
    place = chance.randrange(len(rows))
    match chance.randrange(5):
        case 0:
            del rows[place]
        case 1:
            rows.insert(place, rows[chance.randrange(len(rows))])
        case 2:
            chance.shuffle(rows)
        case _:
            separator = chance.choice((b",", b" = ", b"="))
            cells = rows[place].split(separator)
            text = chance.choice((chance.choice(damage.TEXTS), chance.choice(damage.NUMBERS), '"', '""', "a" * 200_000))
            cells[chance.randrange(len(cells))] = text.encode("utf-8", "surrogatepass")
            rows[place] = separator.join(cells)
    return b"\n".join(rows)


JSON = (json_document, json_document, json_document)
SHARD = (safetensors, safetensors, safetensors_entry, safetensors_entry, numbers_in_data)
# By how a file's name ends; each is chosen as often as damage that knows nothing of formats.
BY_NAME: dict[str, tuple[Mutator, ...]] = {
    ".json": (*JSON, *damage.TEXT),
    ".jsonl": (json_lines, json_lines, json_lines, lines, *damage.TEXT),
    ".csv": (lines, lines, lines, json_cells, json_cells, *damage.TEXT),
    ".txt": (lines, *damage.TEXT),
    ".parquet": (parquet, parquet, parquet, parquet, *damage.ANY),
    ".ini": (lines, lines, lines, lines, *damage.TEXT),
    ".safetensors": (*SHARD, *SHARD, *damage.ANY),
    ".engine": (*SHARD, *SHARD, *damage.ANY),
    ".model": (tokenizer, tokenizer, tokenizer, tokenizer, *damage.ANY),
    ".npz": (NPZ, NPZ, NPZ, NPZ, *damage.ANY),
    ".npy": (npy, npy, npy, npy, npy, *damage.ANY),
    "pytorch_model.bin": (TORCH, TORCH, TORCH, TORCH, *damage.ANY),
    ".bin": (numbers_in_data, TORCH, TORCH, *damage.ANY),
}


def mutated(chance: Random, name: str, content: bytes) -> bytes:
    """One to three changes of a file's content."""
    mutators = next((each for end, each in BY_NAME.items() if name.endswith(end)), damage.ANY)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        content = chance.choice(mutators)(chance, content)
    return content
