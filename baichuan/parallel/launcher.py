"""How a launcher, such as mpirun, started this process: by the environment that it sets, before MPI is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

NAMES = (  # of the world's size, the rank and the number of ranks on this machine: Open MPI, MPICH, MVAPICH
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class Launch:
    world_size: int = 1
    rank: int = 0
    local_size: int = 1  # ranks on this machine


def launch() -> Launch:
    """Of this process; a world of one where no launcher said otherwise."""
    for size, rank, local_size in NAMES:
        world_size = int(os.environ.get(size, "1"))
        if world_size != 1:
            return Launch(world_size, int(os.environ.get(rank, "0")), int(os.environ.get(local_size, world_size)))
    return Launch()
