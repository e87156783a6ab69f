"""A file's digests by a process of its own.

Threads of this process would take turns with its imports in holding Python's lock, which makes those a third slower.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from baichuan.util import manifest

PACKAGES = Path(__file__).resolve().parents[2]  # the folder that this package is in
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from baichuan.util.digest_process import tell; tell(sys.argv[2])"
)


class ProcessDescriber:
    """Implements manifest.Description for a complete file, from begin() on."""

    def __init__(self, path: Path):
        self.path = path
        self._process: subprocess.Popen | None = None

    def begin(self) -> None:
        command = [sys.executable, "-c", PROGRAM, str(PACKAGES), str(self.path)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with suppress(OSError):  # too many processes, for one: entry() then does without
            self._process = subprocess.Popen(command, **streams)  # type: ignore[call-overload]

    def entry(self) -> dict:
        """What manifest.describe finds; to be called once."""
        said = self._process.communicate()[0] if self._process else b""
        if self._process and self._process.returncode == 0:
            return json.loads(said)
        return manifest.describe(self.path)  # which says what is wrong

    def close(self) -> None:
        """Give up what is unfinished."""
        if self._process and self._process.stdout:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


def tell(path: str) -> None:
    """Print what manifest.describe finds, for the process that asked."""
    print(json.dumps(manifest.describe(Path(path))))
