"""How a launcher, such as mpirun, started this process: by the environment that it sets, before MPI is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

from baichuan.errors import ConfigError

LAUNCHERS = (  # size and rank, in the world and on this machine: Open MPI, MPICH, MVAPICH
    (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")),
    (("PMI_SIZE", "PMI_RANK"), ("MPI_LOCALNRANKS", "MPI_LOCALRANKID")),
    (("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"), ("MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK")),
)


@dataclass(frozen=True)
class Launch:
    world_size: int = 1
    rank: int = 0
    local_size: int = 1  # ranks on this machine
    local_rank: int | None = 0  # among them; None = the launcher does not say


def launch() -> Launch:
    """How this process was launched: in a world of one where no launcher says otherwise.

    Raises ConfigError for what is no number.
    """
    for world, local in LAUNCHERS:
        size, rank = (_number(name, default) for name, default in zip(world, (1, 0), strict=True))
        if size != 1:
            local_size, local_rank = (_number(name, None) for name in local)
            return Launch(size or 1, rank or 0, local_size or size or 1, local_rank)
    return Launch()


def _number(name: str, default: int | None) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"the environment variable {name} is {text[:40]!r} and no launcher's number; unset it")
    return int(text)
