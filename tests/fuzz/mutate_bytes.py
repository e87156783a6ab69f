"""Damage that knows nothing of formats.  Every function: (chance, content) -> changed content."""

from __future__ import annotations

import re
from random import Random

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]
NUMBERS = [
    *("-1", "0", "1", "2", "3", "255", "256", "65535", "65537", "2147483647", "2147483648", "4294967295"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "1" + "0" * 30, "9" * 5000, "-" + "9" * 40),
    *(
        "1e308",
        "1e999",
        "-0.0",
        "0.5",
        "1e-400",
        "NaN",
        "Infinity",
        "-Infinity",
        "nan",
        "inf",
        "0x10",
        "1_000",
        "٣",
        "",
    ),
]
TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\x1b[31mred\x1b[0m",
        "a\nb",
        "\u202eabc",
        "\ud800",
        "\ufeff",
        "😀",
        "..",
        "/",
        "/nowhere/zero",
    ),
    *(
        "../outside/secret.safetensors",
        "/nowhere/x",
        "%(x)s",
        "{}",
        "__import__('os')",
        "None",
        "True",
        "x" * 70000,
    ),
    *("~", "a\\b", "CON", "-", "--help", "\x85", "\u2028", "é" * 300, "'", '"', "${HOME}", "a=b", "[x]", "#"),
]
SMALL_FILES = [b"\0", b"\n", b"{}", b"[]", b"null", b"PK\x03\x04", b"\x93NUMPY", b"GIF89a", b"\0" * 4096]
SMALL_FILES += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<html>Not found</html>"]
LARGE_FILES = [(b"[],", 10 << 20), (b"[", 8 << 20), (b"\0", 64 << 20), (b"1,", 16 << 20), (b'{"a":', 1 << 20)]
LARGE_FILES += [
    (b"a", 48 << 20),
    (b"\n", 32 << 20),
    (b" ", 64 << 20),
    (b"{},", 8 << 20),
    (b"\r\n\n", 20 << 20),
]  # pieces, and how often they are repeated
LARGE = 64  # one mutation in this many may make a large file


def flip_bits(chance: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[place(chance, len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def set_bytes(chance: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    start, value = place(chance, len(changed) + 1), chance.choice(INTERESTING)
    count = chance.choice((1, 2, 4, 8))
    changed[start : start + count] = bytes([value]) * count
    return bytes(changed)


def truncate(chance: Random, content: bytes) -> bytes:
    return content[: place(chance, len(content) + 1)]


def cut_out(chance: Random, content: bytes) -> bytes:
    start = place(chance, len(content) + 1)
    return content[:start] + content[start + chance.choice((1, 2, 7, 8, 64, 1000)) :]


def repeat(chance: Random, content: bytes) -> bytes:
    start = place(chance, len(content) + 1)
    piece = content[start : start + chance.choice((1, 4, 16, 300))]
    return content[:start] + piece * chance.choice((2, 3, 50)) + content[start:]


def splice(chance: Random, content: bytes) -> bytes:
    """A piece of the file in another place of it."""
    start, target = place(chance, len(content) + 1), place(chance, len(content) + 1)
    piece = content[start : start + chance.choice((1, 8, 100, 5000))]
    return content[:target] + piece + content[target + chance.choice((0, len(piece))) :]


def insert_random(chance: Random, content: bytes) -> bytes:
    start = place(chance, len(content) + 1)
    return content[:start] + chance.randbytes(chance.choice((1, 4, 40, 4000))) + content[start:]


def edit_number(chance: Random, content: bytes) -> bytes:
    """One of the numbers that are written in digits."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content[:20000]))
    if not numbers:
        return flip_bits(chance, content)
    found = chance.choice(numbers)
    return content[: found.start()] + chance.choice(NUMBERS).encode() + content[found.end() :]


def edit_word(chance: Random, content: bytes) -> bytes:
    words = list(re.finditer(rb"[A-Za-z_.]{2,}", content[:20000]))
    if not words:
        return flip_bits(chance, content)
    found, other = chance.choice(words), chance.choice(words)[0]
    text = chance.choice((chance.choice(TEXTS).encode("utf-8", "surrogatepass"), other, found[0].swapcase()))
    return content[: found.start()] + text + content[found.end() :]


def integer_in_binary(chance: Random, content: bytes) -> bytes:
    """An extreme little-endian integer somewhere."""
    size = chance.choice((2, 4, 8))
    value = chance.choice(
        (0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1, chance.getrandbits(31))
    )
    start = place(chance, len(content) + 1)
    return content[:start] + (value % (1 << 8 * size)).to_bytes(size, "little") + content[start + size :]


def other_encoding(chance: Random, content: bytes) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(chance.choice(("utf-16", "utf-8-sig", "utf-32", "cp037", "gb18030")), "replace")


def nothing(chance: Random, content: bytes) -> bytes:
    return b""


def other_content(chance: Random, content: bytes) -> bytes:
    """Something else altogether."""
    if chance.randrange(LARGE):
        return chance.choice((*SMALL_FILES, b"\x1f\x8b" + content[:50]))
    piece, count = chance.choice(LARGE_FILES)
    return piece * count


def place(chance: Random, size: int) -> int:
    """An index below size, often near the beginning or the end, where headers and directories are."""
    if size <= 0:
        return 0
    near = min(size, chance.choice((16, 200, 2000)))
    return chance.choice((chance.randrange(size), chance.randrange(near), size - 1 - chance.randrange(near)))


ANY = (flip_bits, flip_bits, set_bytes, truncate, cut_out, repeat, splice, insert_random, integer_in_binary, nothing)
ANY += (other_content,)
TEXT = (*ANY, edit_number, edit_number, edit_word, edit_word, other_encoding)
