"""An executor whose cache has a row for each sequence, as TensorRT's has, made of the reference executor."""

from __future__ import annotations

from dataclasses import dataclass

import golden_sessions

from baichuan.config import QuantConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.kv_cache import KVCache
from baichuan.generation.static_session import StaticSession


@dataclass(frozen=True)
class Rows:
    """executors.base.RowCache over a paged cache after forget(): each row has blocks of its own."""

    paged: KVCache

    def reorder(self, parents):
        tables = self.paged.layers[0].tables.long()
        for layer in self.paged.layers:
            for kept in (layer.k, layer.v):
                kept[tables[: len(parents)]] = kept[tables[parents]]

    def truncate(self, row, length):
        pass


class RowExecutor:
    """executors.base.RowExecutor"""

    paged = False

    def __init__(self, *args):
        self._executor = ReferenceExecutor(*args)
        self.device, self.reset, self.forward = self._executor.device, self._executor.reset, self._executor.forward

    @property
    def cache(self):
        return Rows(self._executor.cache)


def static_session(version: str, **limits) -> StaticSession:
    session = golden_sessions.session(version, **limits)
    executor = RowExecutor(session.model, QuantConfig(), golden_sessions.weights(version))
    return StaticSession(executor, session.model, session.build)
