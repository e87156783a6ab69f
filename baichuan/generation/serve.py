"""How an executor serves requests: in flight over a paged cache, else one static batch after another."""

from __future__ import annotations

import logging
from typing import cast

from baichuan.config import BuildConfig, ModelConfig
from baichuan.executors.base import Executor, PagedExecutor, RowExecutor
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.generation.requests import Serving
from baichuan.generation.static_batches import StaticBatches
from baichuan.generation.static_session import StaticSession

logger = logging.getLogger(__name__)


def serve(executor: Executor, model: ModelConfig, build: BuildConfig, policy: Policy | None = None) -> Serving:
    """policy: of executors with a paged cache; static batches have none"""
    if executor.paged:
        return InFlight(cast(PagedExecutor, executor), model, build, policy)
    logger.info("%s has no paged KV cache: requests run in static batches, one after another", build.backend)
    return StaticBatches(StaticSession(cast(RowExecutor, executor), model, build))
