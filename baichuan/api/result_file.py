"""A file of results, one JSON object a line: written as they come, so that a run that is killed loses none of them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baichuan.errors import ConfigError
from baichuan.util.files import atomic_path

MAX_LINE_BYTES = 16 << 20
START = b'{"key": "'  # the beginning of every line


class ResultFile:
    """`done`: the `request` of each result in the file, by its key; errors are not among them."""

    def __init__(self, path: Path, file: Any):
        self.path, self._file = path, file
        self.done: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}  # (offset, length) of each key's newest line
        self._end = 0

    def read(self, keys: Container[str]) -> None:
        """Take up the results of an earlier run for these keys; a line that it did not finish is removed."""
        for number, line in enumerate(iter(lambda: self._file.readline(MAX_LINE_BYTES), b""), start=1):
            values = _result(line)
            zeros = number > 1 and not line.strip(b"\0")  # a machine that lost its power may leave them
            torn = not line.endswith(b"\n") and (zeros or line.startswith(START[: len(line)]))
            if values is None and (not torn or len(line) == MAX_LINE_BYTES):
                raise ConfigError(f"output_jsonl {self.path} line {number} is no result; name another file")
            if values is None:
                break
            if values["key"] in keys:
                self._took(values, len(line))
            elif "error" in values:  # a prompt that failed and has been removed since
                self._end += len(line)
            else:
                raise self.of_another_run(values["key"])
        self._file.seek(self._end)
        self._file.truncate()

    def of_another_run(self, key: str) -> ConfigError:
        return ConfigError(
            f"output_jsonl {self.path} has a result of {key[:100]!r} for another prompt, setting or engine than this "
            "run's; name another file"
        )

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a result: its key, its request, and an error or what was made."""
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._took(values, len(line))

    def put_in_order(self, keys: Sequence[str]) -> None:
        """Give the lines the order of `keys`, which have all one by now, in one step."""
        offsets = [self._places[key][0] for key in keys]
        if offsets == sorted(offsets) and len(keys) == len(self._places) and self._length(keys) == self._end:
            return
        with atomic_path(self.path) as temporary, open(temporary, "wb") as ordered:
            for key in keys:
                offset, length = self._places[key]
                self._file.seek(offset)
                ordered.write(self._file.read(length))

    def _length(self, keys: Sequence[str]) -> int:
        return sum(self._places[key][1] for key in keys)

    def _took(self, values: Mapping[str, Any], length: int) -> None:
        key = values["key"]
        self._places[key] = (self._end, length)
        self._end += length
        if "error" not in values:
            self.done[key] = values["request"]


@contextmanager
def result_file(path: Path, resume: bool, keys: Container[str]) -> Iterator[ResultFile]:
    """The file at `path`, for this run alone.  keys: of its prompts.

    Raises ConfigError for a file with results that `resume` does not allow to go on with, that is none of ours, that
    another run writes, or that cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"output_jsonl {path} is no file; name one")
        file = open(path, "a+b")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ConfigError(f"output_jsonl {path} cannot be written ({error.strerror}); choose another folder") from None
    try:
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"output_jsonl {path} is written by another run; name another file") from None
            if file.tell() and not resume:
                raise ConfigError(
                    f"output_jsonl {path} has results already; add --resume to go on, or name another file"
                )
            file.seek(0)
            results = ResultFile(path, file)
            results.read(keys)
            yield results
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise


def _result(line: bytes) -> dict[str, Any] | None:
    """The line's values; None where it is no complete result."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    right = isinstance(values, dict) and isinstance(values.get("key"), str) and isinstance(values.get("request"), str)
    return values if right else None
