"""A case writes into its own folder alone: anything else is refused and remembered, whatever a script makes of it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
}  # paths of each
CHANGING |= {"os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1}


class Guard:
    """Once installed it stays as long as the process; `broken` is what was tried since it was last emptied."""

    def __init__(self, folder: Path):
        tempfile.tempdir = str(folder)
        caches = (Path.home() / ".cache", Path(os.environ.get("HF_HOME") or Path.home() / ".cache"))
        self.allowed = [os.path.realpath(each) + os.sep for each in (folder, *caches)]
        self.allowed += [os.devnull + os.sep, f"/proc/{os.getpid()}/", "/proc/self/"]
        self.broken: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            paths = [path] if isinstance(flags, int) and flags & WRITING else []
        else:
            paths = args[: CHANGING.get(event, 0)]
            paths = paths[1:] if event == "os.symlink" else paths
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._is_allowed(os.fsdecode(path)):
                self.broken.append(f"{event} {os.fsdecode(path)}"[:300])
                raise PermissionError(f"{event} outside of the case's folder")

    def _is_allowed(self, path: str) -> bool:
        try:
            parent, name = os.path.split(os.path.abspath(path))
            return (os.path.join(os.path.realpath(parent), name) + os.sep).startswith(tuple(self.allowed))
        except ValueError:  # a NUL, which no call accepts
            return True
