"""The CPU kernels, compiled for this processor by the system's C compiler and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from baichuan.util.files import atomic_path, cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11", "-lm")
COMPILE_TIMEOUT_S = 300
SAID: Any = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}  # for what a compiler says
SLOWER = "matrix products run in PyTorch, several times slower than by the kernels that a C compiler makes"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a line in the log, where they cannot be had."""
    try:
        return ctypes.CDLL(str(compiled(cache_folder(), FLAGS)))
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        logger.warning("%s: %s failed (%s); update the compiler or set CC to another", SLOWER, error.cmd[0], said[0])
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s: %s", SLOWER, error)
    return None


def compiled(folder: Path, flags: tuple[str, ...]) -> Path:
    """The library for these flags, compiled now unless the folder has it.

    Its name holds a digest of all that determines its content: sources, flags, compiler, processor.
    Raises OSError or SubprocessError.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler; install gcc")
    command = [*compiler.split(), *flags, *map(str, sorted(SOURCES.glob("*.c")))]
    version = subprocess.run([*compiler.split(), "--version"], check=True, **SAID).stdout
    parts = [version, processor(), *flags, *(path.read_text("utf-8") for path in sorted(SOURCES.iterdir()))]
    path = folder / f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                logger.info("compiling the CPU kernels into %s, once", path)
                call = [*command, "-o", str(temporary)]
                subprocess.run(call, check=True, timeout=COMPILE_TIMEOUT_S, **SAID)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
            ) from None
    return path


def processor() -> str:
    """Name and instruction sets of the processor, as far as the system tells."""
    return "\n".join((platform.machine(), *sorted(instruction_sets())))


@functools.cache
def instruction_sets() -> frozenset[str]:
    """Linux's names for what the processor can do, such as avx512_bf16; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())
