"""Generated text as a terminal may show it."""

from __future__ import annotations

import re

# Control characters but for newline and tab, and those that reorder what stands around them on the screen.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that a terminal shows them instead of obeying them."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
