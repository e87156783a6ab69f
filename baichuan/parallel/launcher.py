"""How a launcher, such as mpirun, started this process: by the environment that it sets, before MPI is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
    """Of this process; a world of one where no launcher said otherwise."""
    for world, local in LAUNCHERS:
        size, rank = (int(os.environ.get(name, default)) for name, default in zip(world, ("1", "0"), strict=True))
        if size != 1:
            local_size, local_rank = (os.environ.get(name) for name in local)
            return Launch(size, rank, int(local_size or size), None if local_rank is None else int(local_rank))
    return Launch()
