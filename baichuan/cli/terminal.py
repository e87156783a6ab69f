"""Input and output of a chat: turns from a line editor or from plain lines, text printed as it is generated."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from baichuan.errors import ConfigError
from baichuan.text.printable import printable

PROMPT = "> "


class Stopped(Exception):
    """The person asked for the answer to end."""


class TextPrinter:
    """Prints a text that comes in pieces.  `text`: all of it so far."""

    def __init__(self, opening: str = "", closing: str = ""):
        self.text, self._closing = "", closing
        print(printable(opening), end="", flush=True)

    def show(self, piece: str) -> None:
        self.text += piece
        print(printable(piece), end="", flush=True)

    def finish(self) -> None:
        print(self._closing, flush=True)


MAX_TURN = 1 << 20  # characters of a message


class LineReader:
    """A turn is a line of standard input: for pipes, and for mpirun, which passes its input on as a pipe.

    Open MPI 5 does not pass on the end of its input, so that only a command can end the chat there.
    """

    interactive = False
    keys = "Each line is a message, exit leaves"

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_) -> None:
        pass

    def read(self) -> str | None:
        """The next turn; None at the end of input."""
        if not sys.stdin:  # the program was started without one
            return None
        print(PROMPT, end="", flush=True)
        try:
            line = sys.stdin.readline(MAX_TURN + 1)
        except UnicodeDecodeError:
            raise ConfigError("what was typed is not valid UTF-8; set the terminal to UTF-8") from None
        except OSError as error:
            raise ConfigError(f"standard input cannot be read ({error.strerror}); give a terminal or a pipe") from None
        if len(line) > MAX_TURN:
            raise ConfigError(f"a line of the chat has more than {MAX_TURN} characters; give a shorter message")
        if not line:
            print()
        return line.removesuffix("\n") if line else None

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Ctrl-C ends the program, as anywhere."""
        yield lambda: False


class EditorReader:
    """A turn is the text that a line editor with history returns; pasted text is one turn, however many lines it has.

    While entered, Ctrl-C ends an answer or clears the line, and never ends the program.
    """

    interactive = True
    keys = "Enter sends, Esc Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves"

    def __init__(self):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()
        bindings.add("enter")(lambda event: event.current_buffer.validate_and_handle())
        bindings.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        indent = " " * len(PROMPT)
        self._session = PromptSession(PROMPT, multiline=True, key_bindings=bindings, prompt_continuation=indent)
        self._answering = self._stopped = False

    def __enter__(self) -> EditorReader:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def read(self) -> str | None:
        """The next turn; None after Ctrl-D."""
        while True:
            try:
                return self._session.prompt()
            except KeyboardInterrupt:
                print("[Ctrl-D leaves]")
            except EOFError:
                return None

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that says, between two steps, whether Ctrl-C was pressed.  At the second Ctrl-C, Stopped is
        raised, wherever the program is."""
        self._answering, self._stopped = True, False
        try:
            yield lambda: self._stopped
        finally:
            self._answering = False

    def _interrupt(self, *_) -> None:
        if self._answering and self._stopped:
            raise Stopped
        self._stopped = True


def open_reader(ranks: int) -> LineReader | EditorReader:
    """The editor where a person sits at a terminal, plain lines elsewhere."""
    terminal = ranks == 1 and all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    return EditorReader() if terminal else LineReader()
