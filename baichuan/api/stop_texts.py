"""Texts that end a continuation where they first occur in it."""

from __future__ import annotations

from collections.abc import Sequence

from baichuan.text.tokenizer import Tokenizer


class StopTexts:
    """Watches one continuation.  `text`: what it holds so far, up to the first of the stop texts; `found`: whether
    there is one."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str]):
        self._stream, self._stop_texts = tokenizer.stream(), [each for each in stop_texts if each]
        self._longest = max(map(len, self._stop_texts), default=0)
        self.text, self.found = "", False

    def push(self, ids: Sequence[int], last: bool) -> bool:
        """Take the next ids; last: there are no more.  Returns whether a stop text has been found."""
        if self.found:
            return True
        start = max(0, len(self.text) - self._longest)  # earlier parts have been searched
        self.text += "".join(map(self._stream.push, ids)) + (self._stream.finish() if last else "")
        places = [place for each in self._stop_texts if (place := self.text.find(each, start)) >= 0]
        if places:
            self.text, self.found = self.text[: min(places)], True
        return self.found
