"""Damage to NumPy's files, to zip archives and to pickles within them.  Every mutator: (chance, content) -> content."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random

import numpy as np

from tests.fuzz import mutate_bytes as damage

Mutator = Callable[[Random, bytes], bytes]

HEADERS = [
    *(
        "{",
        "",
        "}",
        "{'descr': '<i4'}",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), 'x': 1}",
        "None",
        "(((" * 500,
    ),
    *(
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': ()}",
    ),
    *("{'descr': '<i4', 'fortran_order': True, 'shape': (-1,)}", "{'descr': '<V0', 'fortran_order': 0, 'shape': (2,)}"),
    *("  {'descr': '<i4'\n 'x'", "{'descr': '>i8', 'fortran_order': False, 'shape': (1, 2)}", "9" * 60000, "'''", "\\"),
    *(
        "{'descr': '<U4', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<m8[ns]', 'fortran_order': False, 'shape': ()}",
    ),
]
SHAPES = [
    "()",
    "(0,)",
    "(True, 2)",
    f"({1 << 63}, 1)",
    f"({1 << 62},)",
    "(-1,)",
    "(1.5,)",
    "(2, 3, 4)",
    "[2]",
    "2",
    "('a',)",
]
SHAPES += [
    f"({1 << 32}, {1 << 32})",
    "(0, 5)",
    "(1,)",
    f"({10**30},)",
    "(" + "1," * 100 + ")",
    "(3, 1)",
    f"({1 << 20}, 0)",
]


def npy(chance: Random, content: bytes) -> bytes:
    if content[:6] != b"\x93NUMPY":
        return damage.flip_bits(chance, content)
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin-1"), content[10 + length :]
    match chance.randrange(6):
        case 0:
            header = chance.choice(HEADERS)
        case 1 | 2:
            header = re.sub(r"\([^)]*\)", chance.choice(SHAPES), header, count=1)
        case 3:
            kinds = ("<i8", ">i4", "<f4", "|b1", "<u8", "<c8", "|S3", "|O", "<U2", "<M8[s]", "i", "", "<i3")
            header = re.sub(r"'[<|>=][^']*'", repr(chance.choice(kinds)), header, count=1)
        case 4:
            return npy_of(chance)
        case 5:
            header = damage.TEXT[chance.randrange(len(damage.TEXT))](chance, header.encode())[:60000].decode("latin-1")
    version, form = chance.choice(((1, "<H"), (1, "<H"), (1, "<H"), (2, "<I"), (3, "<I"), (4, "<I"), (0, "<H")))
    encoded = header.encode("utf-8", "replace")[:65000] + b"\n"
    size = struct.pack(form, len(encoded) if chance.randrange(8) else chance.choice((0, 1, 65535)))
    return b"\x93NUMPY" + bytes([version, 0]) + size + encoded + data


def npy_of(chance: Random) -> bytes:
    """A right file of unusual values."""
    kinds = ("<i4", ">i8", "<u8", "|i1", "<f4", "|b1", "<i2")
    array = np.full(
        chance.choice(((), (0,), (3,), (2, 3), (3, 0), (1, 1), (2, 2, 2), (1, 3000))), chance.choice((0, 1, 7, -1))
    )
    out = io.BytesIO()
    np.save(out, np.asfortranarray(array.astype(chance.choice(kinds))))
    return out.getvalue()


def zip_archive(inner: dict[str, tuple[Mutator, ...]]) -> Mutator:
    """inner: how members are damaged, by how their names end."""

    def mutate(chance: Random, content: bytes) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        except Exception:  # damaged by an earlier mutation
            return damage.flip_bits(chance, content)
        if not members:  # an earlier one was the last
            return damage.insert_random(chance, content)
        place = chance.randrange(len(members))
        name, data = members[place]
        method, flag = zipfile.ZIP_STORED, 0
        match chance.randrange(10):
            case 0:
                members.pop(place)
            case 1:
                members.append((name, data[::-1]))
            case 2:
                members[place] = (
                    chance.choice(["../x.npy", "/x", "a/data.pkl", "a/byteorder", *map(_name, damage.TEXTS)]),
                    data,
                )
            case 3:
                method = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            case 4:
                flag = chance.choice((0x1, 0x8, 0x40, 0x800))
            case 5:
                other = chance.randrange(len(members))
                members[place], members[other] = (name, members[other][1]), (members[other][0], data)
            case _:
                mutators = next((each for end, each in inner.items() if name.endswith(end)), damage.ANY)
                members[place] = (name, chance.choice(mutators)(chance, data)[: 16 << 20])
        packed = _packed(members, method)
        if flag or not chance.randrange(10):
            packed = _edited_directory(chance, packed, flag)
        return packed

    return mutate


def _name(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "")[:200] or "x"


def _packed(members: list[tuple[str, bytes]], method: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name given twice
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def _edited_directory(chance: Random, content: bytes, flag: int) -> bytes:
    """A field of one central directory entry, and of its local header alike where it is the flag."""
    places = [found.start() for found in re.finditer(b"PK\x01\x02", content)]
    if not places:
        return content
    changed, start = bytearray(content), chance.choice(places)
    if flag:
        changed[start + 8 : start + 10] = flag.to_bytes(2, "little")
        local = int.from_bytes(content[start + 42 : start + 46], "little")
        changed[local + 6 : local + 8] = flag.to_bytes(2, "little")
    else:
        field = chance.choice((4, 6, 10, 16, 20, 24, 28, 30, 42))
        changed[start + field : start + field + 2] = chance.choice((0, 1, 8, 12, 14, 99, 0x7FFF, 0xFFFF)).to_bytes(
            2, "little"
        )
    return bytes(changed)


OPCODES = b"(.0120FIJKLMNPQRSTUVX]abcdefghijloqprstuv}BC)\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d"
OPCODES += b"\x8e\x8f\x90\x93\x94\x95\x97"
PIECES = [
    b"\x85" * 60,
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"X\x04\x00\x00\x00\x1b[1m",
    b"h\x00",
    b"\x8a\x08" + b"\xff" * 8,
]
PIECES += [
    b"}",
    b"]",
    b")",
    b"(",
    b"R",
    b"b",
    b"Q",
    b"\x8b\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"(" * 1000,
    b"N" * 1000,
]


def pickle(chance: Random, content: bytes) -> bytes:
    start = chance.randrange(len(content) + 1)
    match chance.randrange(4):
        case 0:
            return content[:start] + bytes([chance.choice(OPCODES)]) + content[start:]
        case 1:
            return content[:start] + bytes([chance.choice(OPCODES)]) + content[start + 1 :]
        case 2:
            return content[:start] + chance.choice(PIECES) + content[start:]
        case _:
            return chance.choice(damage.ANY)(chance, content)


NPZ = zip_archive({".npy": (npy, npy, *damage.ANY)})
TORCH = zip_archive({"data.pkl": (pickle, pickle, pickle, *damage.ANY)})
