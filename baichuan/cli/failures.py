"""What ended a script, as a sentence that says what a user can do."""

from __future__ import annotations

import errno
import signal
import time

from baichuan.errors import UnsupportedError

SIGNAL_S = 2  # an error so soon after a signal comes from it
USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EEXIST)


def import_torch() -> None:
    """Raises UnsupportedError where this machine, as it is now, does not load PyTorch."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError, MemoryError) as error:
        raise UnsupportedError(_not_loaded("PyTorch", error)) from None


def _not_loaded(package: str, error: Exception) -> str:
    what = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{package} cannot be loaded ({what}); free memory and disk space, or install it again: python -m "
        "baichuan.doctor tells more"
    )


def stopped(number: int) -> str:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"stopped by {name}; nothing unfinished was kept"


def stopped_by(came: list[tuple[int, float]]) -> str:
    """Why the program stopped, where the last signal came just now and not before something that went on; else ''."""
    if not came or time.monotonic() - came[-1][1] > SIGNAL_S:
        return ""
    return stopped(came[-1][0])


def users_error(error: Exception) -> str:
    """What a user can do about a file that could not be read or written, or a package; '' for any other error."""
    if isinstance(error, ImportError) and (package := (error.name or "a package").partition(".")[0]) != "baichuan":
        return _not_loaded(package, error)
    if not isinstance(error, OSError) or error.errno not in USERS_ERRORS + WRONG_PATH:
        return ""
    remedy = "check the path" if error.errno in WRONG_PATH else "free space or choose another folder"
    return f"{error.filename or 'a file'}: {error.strerror}; {remedy}"
