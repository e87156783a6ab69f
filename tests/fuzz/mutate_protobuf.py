"""Damage to a tokenizer's protobuf that keeps its format: pieces, their kinds and scores, settings.

A message is a list of (number, kind, value); kinds are those of the wire format: 0 integer, 1 and 5 fixed, 2 bytes.
"""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from tests.fuzz import mutate_bytes as damage

Field = tuple[int, int, Any]
PIECE = 1  # number of a piece in the model; in a piece: its text, its score and its kind
TEXT, SCORE, KIND = 1, 2, 3
FIXED = {1: 8, 5: 4}  # bytes
LARGEST = 1 << 20  # bytes that are read here field by field: other damage can make megabytes of zeros
INTEGERS = (0, 1, 2, 3, 4, 5, 6, 7, 100, 1 << 31, 1 << 62, (1 << 64) - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 1e38, -1.0, 0.0)
PIECES = ["", " ", "\u2581", "<0x1B>", "\x1b[31m", "a" * 70_000, "<unk>", "<s>", "<reserved_106>", "\U0001f600", "\n"]
# What normalises text: a trie of so many bytes, then strings.
TRIES = [struct.pack("<I", size) + b"\xff\xff\xff\x7fa\0b\0" * count for size, count in ((16, 3), (1024, 200))]
TRIES.append(struct.pack("<I", 1 << 31) + b"a\0")


def tokenizer(chance: Random, content: bytes) -> bytes:
    if len(content) > LARGEST:
        return damage.flip_bits(chance, content)
    try:
        fields = parse(content)
    except (IndexError, ValueError):
        return damage.flip_bits(chance, content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = [place for place, field in enumerate(fields) if (field[0] == PIECE) == bool(chance.randrange(2))]
        if places:
            _change(chance, fields, chance.choice(places))
    return packed(fields)


def _change(chance: Random, fields: list[Field], place: int) -> None:
    number, kind, value = fields[place]
    match chance.randrange(8):
        case 0:
            del fields[place]
        case 1:
            fields.insert(chance.randrange(len(fields) + 1), fields[place])
        case 2:
            del fields[place : place + chance.choice((10, 300, 5000))]
        case 3 if number == PIECE:
            fields[place] = (number, kind, packed([(TEXT, 2, chance.choice(PIECES).encode()), (SCORE, 5, bytes(4))]))
        case 4 if number == PIECE:
            fields[place] = (number, kind, value + packed([(KIND, 0, chance.choice(INTEGERS[:9]))]))
        case _ if kind == 2:
            fields[place] = (number, kind, _changed_message(chance, value))


def _changed_message(chance: Random, content: bytes) -> bytes:
    try:
        inner = parse(content)
    except (IndexError, ValueError):
        return damage.set_bytes(chance, content)
    inner = inner or [(2, 2, b"")]
    place = chance.randrange(len(inner))
    number, kind, value = inner[place]
    match kind:
        case 0:
            value = chance.choice(INTEGERS)
        case 2:
            value = chance.choice((b"", value[::-1], value * 2, chance.randbytes(9), b"\xff", *TRIES))
        case 5:
            value = struct.pack("<f", chance.choice(FLOATS))
    inner[place] = (number, kind, value)
    return packed(inner)


def parse(content: bytes) -> list[Field]:
    """IndexError or ValueError where it is no message."""
    fields, place = [], 0
    while place < len(content):
        key, place = _integer(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _integer(content, place)
        elif kind == 2 or kind in FIXED:
            size, place = _integer(content, place) if kind == 2 else (FIXED[kind], place)
            if len(value := content[place : place + size]) < size:
                raise ValueError("it ends too early")
            place += size
        else:
            raise ValueError("another kind")
        fields.append((key >> 3, kind, value))
    return fields


def packed(fields: list[Field]) -> bytes:
    parts: list[bytes] = []
    for number, kind, value in fields:
        parts += [_bytes(number << 3 | kind), _bytes(value) if kind == 0 else value]
        if kind == 2:
            parts.insert(-1, _bytes(len(value)))
    return b"".join(parts)


def _integer(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def _bytes(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
