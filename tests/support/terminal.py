"""A program on a terminal of its own, with a screen that can be read."""

from __future__ import annotations

import re
import time

import pexpect
import pyte
import scripts

ROWS, COLUMNS = 60, 160  # so wide that no text that tests wait for is wrapped
PASTE = "\x1b[200~{}\x1b[201~"  # what a terminal sends for a paste
ENTER, ESCAPE, BACKSPACE, UP, LEFT, CTRL_C, CTRL_D = "\r", "\x1b", "\x7f", "\x1b[A", "\x1b[D", "\x03", "\x04"


class Terminal:
    """Starts `command`; what it writes moves the screen as a terminal would."""

    def __init__(self, command: list[str]):
        environment = {**scripts.ENVIRONMENT, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._child = pexpect.spawn(
            command[0], command[1:], dimensions=(ROWS, COLUMNS), encoding="utf-8", env=environment
        )
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""  # everything that was written
        self._prompts = 0

    @property
    def text(self) -> str:
        """The screen's lines without the spaces at their ends."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def type(self, keys: str) -> None:
        self._prompts = self._count_prompts()
        self._child.send(keys)

    def wait_for_prompt(self, before: str = "") -> None:
        """Wait for a new, empty prompt since keys were last typed, below a match of `before`."""
        while self._count_prompts() == self._prompts:
            assert self._read(), self.text
        self.wait(before + r"\n>")

    def wait(self, pattern: str, timeout_s: float = 60) -> None:
        """Wait until the screen's text ends with a match of `pattern`."""
        end, deadline = re.compile(f"(?:{pattern})\\Z"), time.monotonic() + timeout_s
        while not end.search(self.text):
            assert time.monotonic() < deadline, f"no {pattern!r} at the end of:\n{self.text}"
            self._read()

    def wait_written(self, characters: int) -> None:
        """Wait until the program has written this many more characters."""
        goal = len(self.raw) + characters
        while len(self.raw) < goal:
            assert self._child.isalive(), self.text
            self._read()

    def idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read()

    def exit_code(self) -> int:
        """Wait for the program's end."""
        while self._read():
            pass
        self._child.close()
        return self._child.exitstatus

    def close(self) -> None:
        self._child.close(force=True)

    def _count_prompts(self) -> int:
        return self.raw.count("\x1b[?2004h")  # the editor asks for bracketed paste when it begins

    def _read(self) -> bool:
        """Read what the program wrote; False once it has ended."""
        try:
            written = self._child.read_nonblocking(4096, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += written
        self._stream.feed(written)
        return True
