"""Replacing a folder's content: the new one is prepared beside it, reaches the disk and takes its place in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from baichuan.util.files import unfinished
from baichuan.util.signals import ENDING, ignored

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h
SYNC_PAUSE_S = 0.1  # between two rounds of synced_meanwhile
NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY, errno.ENOTSUP)  # no exchange here


def staged_folder(target: Path) -> AbstractContextManager[Path]:
    """An empty folder for the new content of the folder `target`; what is still in it at the end is deleted.

    It lies beside target, or inside it where nothing can be created beside it.
    """
    target = Path(os.path.realpath(target))
    beside = os.access(target.parent, os.W_OK | os.X_OK) and target.parent.stat().st_dev == target.stat().st_dev
    parent = target.parent if beside else target
    return unfinished(target, parent, f".{target.name}.building-", tempfile.mkdtemp, lambda _: None)


@contextmanager
def synced_meanwhile(folder: Path, pattern: str) -> Iterator[None]:
    """While the block writes files of such names into the folder, what they hold already goes to the disk:
    publish_folder, which waits until all is there, has little left to wait for.

    Raises the OSError of what could not be stored, which Linux tells only once.  Who interrupts the block waits until
    the file that is on its way has been stored.
    """
    ended = threading.Event()
    errors: list[OSError] = []

    def sync() -> None:
        stored: dict[Path, tuple[int, int]] = {}  # size and time of the last change
        while not (ended.wait(SYNC_PAUSE_S) or errors):
            with suppress(OSError):  # what cannot be listed or opened now, publish_folder will open
                for path in folder.glob(pattern):
                    state = path.stat()
                    if ended.is_set() or errors:
                        break
                    if stored.get(path) != (state.st_size, state.st_mtime_ns):
                        stored[path] = state.st_size, state.st_mtime_ns
                        _sync(path, errors)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
    thread.join()
    if errors:
        raise errors[0]


def publish_folder(staged: Path, target: Path, replaced: Set[str], last: str) -> None:
    """Give target the content of `staged`, which staged_folder(target) made.

    The files named in `replaced`, the older content, are removed; everything else in target stays.  Whenever the
    process dies, the disk holds one of the two contents whole.  Only where the file system cannot exchange two folders,
    or where target holds other folders or is the current folder (which a shell would see as deleted), are files moved
    one by one, `last` at the end, so that a reader notices an incomplete content.
    """
    target = Path(os.path.realpath(target))
    names = {path.name for path in staged.iterdir()}
    for name in names:
        _sync(staged / name)
    with ignored(*ENDING):
        if not _exchange(staged, target, {path.name for path in target.iterdir()} - names - replaced):
            (target / last).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: (name == last, name)):
                os.replace(staged / name, target / name)
            for name in replaced - names:
                (target / name).unlink(missing_ok=True)
        _sync(target.parent)


def _exchange(staged: Path, target: Path, others: Set[str]) -> bool:
    """Exchange the two folders in one step, with target's other files in both.  Returns whether that was possible."""
    if staged.parent != target.parent or any(_is_folder(target / name) for name in others):
        return False
    if _is_current(target):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        for name in others:
            os.link(target / name, staged / name, follow_symlinks=False)
        found = target.stat()
        os.chmod(staged, found.st_mode & 0o7777)
        _sync(staged)
    except (AttributeError, OSError):
        return False
    if rename(AT_FDCWD, os.fsencode(staged), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _is_current(folder: Path) -> bool:
    try:
        return folder.samefile(os.curdir)
    except FileNotFoundError:  # somebody has deleted the current folder
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _sync(path: Path, errors: list[OSError] | None = None) -> None:
    """Wait until the file or folder is on the disk.  errors: what takes the OSError where it cannot be stored"""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if errors is None:
            raise
        errors.append(error)
    finally:
        os.close(handle)
