"""What the ranks that open an engine settle before they load it: all have the same one, and it is for so many."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NamedTuple

from baichuan.engine.folder import Engine, read_engine
from baichuan.errors import BaichuanError, EngineError, counted
from baichuan.parallel.comm import Communicator


class _Found(NamedTuple):
    """What one rank read."""

    folder: str
    reader: str  # the rank and its machine
    digest: str  # Engine.digest; "" where there is an error
    error: str


def read_alike(folder: Path, comm: Communicator) -> Engine:
    """The engine's record, the same on every rank, whose folders may be different ones.  Every rank calls it.

    Raises EngineError, on every rank, where one cannot read its folder's or has another engine than rank 0.
    """
    engine, error = None, ""
    try:
        engine = read_engine(folder)
    except BaichuanError as problem:
        error = str(problem)
    reader = f"rank {comm.rank} on {socket.gethostname()}"
    ranks = comm.gather_objects(_Found(str(folder), reader, engine.digest if engine else "", error))
    if engine is None:
        raise EngineError(error)
    first = ranks[0]
    for found in ranks:
        if found.error:
            raise EngineError(f"{found.reader} cannot use its engine: {found.error}")
        if found.digest != first.digest:
            raise EngineError(
                f"{found.folder} of {found.reader} is another engine than {first.folder} of {first.reader} "
                f"(digest {found.digest[:12]} instead of {first.digest[:12]}); give every rank the same engine"
            )
    return engine


def check_world(engine: Engine, comm: Communicator, model_version: str | None = None) -> None:
    """Raise EngineError unless the engine was built for this many ranks and, if given, for this version."""
    if comm.world_size != engine.build.world_size:
        running = "1 is" if comm.world_size == 1 else f"{comm.world_size} are"
        raise EngineError(
            f"{engine.folder} was built for {counted(engine.build.world_size, 'rank')} and {running} running; "
            f"start it with mpirun -n {engine.build.world_size}, or build with --world_size {comm.world_size}"
        )
    if model_version not in (None, engine.model.model_version):
        raise EngineError(
            f"{engine.folder} holds a {engine.model.model_version} model, not {model_version}; "
            f"run with --model_version {engine.model.model_version}"
        )
