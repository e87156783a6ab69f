"""Text of files, models and libraries as a terminal may show it."""

from __future__ import annotations

import re

MAX_SENTENCE = 2000  # characters
# Control characters except tab and newline, Unicode's line separators, characters that change the direction of the
# text around them, and surrogates, which no encoding can write.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that a terminal shows them instead of obeying them."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """printable(text) with its newlines and tabs spelled out as well: a sentence stays one, whatever it quotes."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def sentence(text: str) -> str:
    """one_line(text), without its middle where it quotes something that is too long to be read."""
    line = one_line(text)
    half = MAX_SENTENCE // 2
    return line if len(line) <= MAX_SENTENCE else f"{line[:half]} [...] {line[-half:]}"
