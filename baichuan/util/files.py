"""Small files: read where they are files and small, written completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from baichuan.util.signals import ENDING, deferred

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"  # how the pointer begins that a clone without Git LFS has for a large file
NEW_S = 0.2  # age below which an unfinished file may not have its lock yet


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading; OSError for anything else: a pipe or a device might never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes to opens at once
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_at_most(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; OSError for a larger one, and for what open_regular refuses."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
        return content


def stand_in(path: Path) -> str | None:
    """What an unfinished download left in the file's place, as a predicate for messages; None for any other content."""
    with open_regular(path) as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return (
            f"is Git LFS's pointer to the file, not the file; run git lfs pull in {path.parent}, or download it again"
        )
    return None if start else "is empty; download it again"


def atomic_path(path: Path) -> AbstractContextManager[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is deleted when it does not.

    Where `path` is a symbolic link, the link stays and its target is replaced.  OSError where a folder, a device or a
    pipe is there.
    """
    path = Path(os.path.realpath(path))  # Path.resolve raises where links form a loop
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "a folder, device or pipe is there, which no file can replace", str(path))

    def replace(temporary: Path) -> None:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)

    return unfinished(path, path.parent, f".{path.name}.unfinished-", _new_file, replace)


@contextmanager
def unfinished(
    target: Path, parent: Path, prefix: str, make: Callable[..., str], finish: Callable[[Path], None]
) -> Iterator[Path]:
    """A new file or folder in `parent`, whose name begins with `prefix`, for what `target` is to hold.

    make: tempfile.mkdtemp or its like.  finish: called with the path when the block ends well.  What is still there
    afterwards is deleted; so is what processes that died left under such names.
    """
    remove_abandoned(parent, prefix)
    temporary = lock = None
    try:
        with deferred(*ENDING):  # in between, nobody would know the path
            temporary = Path(make(prefix=prefix, dir=parent))
        lock = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)  # held while this process lives, however it dies
        yield temporary
        finish(temporary)
    except OSError as error:
        error.filename = error.filename or str(target)  # a failed write does not name its file
        raise
    finally:
        try:
            remove_temporary(temporary)
        except BaseException:  # a signal's, from just before signals were deferred there
            remove_temporary(temporary)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def _new_file(prefix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.close(handle)
    return name


def remove_temporary(path: Path | None) -> None:
    """Remove a file or a folder, if it is still there; signals wait meanwhile."""
    with deferred(*ENDING):
        if path is not None and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path is not None:
            path.unlink(missing_ok=True)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove files and folders of such names whose lock no process holds: what dead processes left."""
    for path in parent.iterdir():
        if path.name.startswith(prefix) and not path.is_symlink() and _is_abandoned(path):
            logger.info("removing %s, which an interrupted run left", path)
            remove_temporary(path)


def _is_abandoned(path: Path) -> bool:
    try:
        if path.is_file() and time.time() - path.stat().st_mtime < NEW_S:
            return False  # between its creation and its lock
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def cache_folder() -> Path:
    """The folder of this user's compiled kernels: https://specifications.freedesktop.org/basedir-spec/latest/

    Raises OSError where there is no home folder.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "baichuan"
    try:
        return Path.home() / ".cache" / "baichuan"
    except RuntimeError:
        raise OSError("this user has no home folder; set XDG_CACHE_HOME to a folder that can be written") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
