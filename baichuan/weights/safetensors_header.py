"""The header of a .safetensors file, before a library parses it: one that is too long takes the library minutes."""

from __future__ import annotations

from pathlib import Path

from baichuan.util.files import open_regular

MAX_HEADER_BYTES = 4 << 20  # a 13B checkpoint's has 30 kB


def require_small_header(path: Path) -> None:
    """Raise OSError for what is no regular file, ValueError for a header that no checkpoint has."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes and at most {MAX_HEADER_BYTES} are read")
