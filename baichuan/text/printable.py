"""Text of files, models and libraries as a terminal may show it."""

from __future__ import annotations

import re

# Control characters but for newline and tab, those that reorder what stands around them on the screen, and halves of
# characters, which no encoding writes.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that a terminal shows them instead of obeying them."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """printable(text) with its newlines and tabs spelled out as well: a sentence stays one, whatever it quotes."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
