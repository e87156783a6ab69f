"""From an engine folder to a session that generates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from baichuan.engine.folder import Engine, verified_meanwhile
from baichuan.engine.world import check_world, read_alike
from baichuan.executors.backend import RankToOpen
from baichuan.executors.base import Executor
from baichuan.executors.device import resolve_device
from baichuan.executors.open_settings import OpenSettings
from baichuan.generation.in_flight import Policy
from baichuan.generation.requests import Serving
from baichuan.generation.serve import serve
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator
from baichuan.util.manifest import Description

logger = logging.getLogger(__name__)

DEFAULTS = OpenSettings()


def open_session(
    folder: Path,
    comm: Communicator,
    model_version: str | None = None,
    settings: OpenSettings = DEFAULTS,
    digests: Mapping[Path, Description] = MappingProxyType({}),
) -> Session:
    """The engine in `folder`, verified, on this rank's GPU or on the CPU.

    digests: of the engine's files, those that are being computed already, by path.
    Raises EngineError for a damaged engine, ranks with different ones, or another number of ranks than it was built
    for, on every rank alike.
    """
    engine = read_alike(folder, comm)
    check_world(engine, comm, model_version)
    return Session(open_verified(engine, comm, settings, digests), engine.model, engine.build)


def open_verified(
    engine: Engine,
    comm: Communicator,
    settings: OpenSettings = DEFAULTS,
    digests: Mapping[Path, Description] = MappingProxyType({}),
) -> Executor:
    """The executor over this rank's file, which is verified meanwhile.  As open_session, which has the errors."""
    if engine.dummy and comm.rank == 0:
        logger.warning("the engine in %s has dummy weights: its text means nothing", engine.folder)
    on_cpu = resolve_device(settings.device) == "cpu"
    with verified_meanwhile(engine, comm, digests):
        executor = None if on_cpu else open_executor(engine, comm, settings)
    if executor is None:  # it maps a file in no time, but what that reads ahead would hold up the digests' reading
        executor = open_executor(engine, comm, settings)
    return executor


def open_serving(
    engine: Engine,
    comm: Communicator,
    settings: OpenSettings = DEFAULTS,
    digests: Mapping[Path, Description] = MappingProxyType({}),
    prefix_caching: bool = True,
) -> tuple[Serving, torch.device]:
    """The engine, which check_world has seen, as requests.Serving, and where it runs."""
    executor = open_verified(engine, comm, settings, digests)
    policy = Policy(prefix_caching=prefix_caching)
    return serve(executor, engine.model, engine.build, policy), executor.device


def open_executor(engine: Engine, comm: Communicator, settings: OpenSettings = DEFAULTS) -> Executor:
    """The executor that the engine was built for, over this rank's file, which the caller verifies."""
    path = engine.rank_file(comm.rank)
    digests = engine.files[path.name]["sha256"]
    job = RankToOpen(path, digests, engine.spec, engine.contract, comm, settings)
    return engine.backend.open_rank(job)
