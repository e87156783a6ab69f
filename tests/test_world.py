"""What the ranks that open an engine settle first: that they all have the same one."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import tiny_engine

from baichuan.engine.folder import read_engine
from baichuan.engine.runtime import open_session
from baichuan.engine.world import read_alike
from baichuan.errors import EngineError
from baichuan.parallel.comm import run_ranks


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Folders by what is in them."""
    top = tmp_path_factory.mktemp("engines")
    tiny_engine.build(top / "first", "v1_7b", tp_size=2)
    shutil.copytree(top / "first", top / "copy")
    tiny_engine.build(top / "other limits", "v1_7b", tp_size=2, max_output_len=7)
    tiny_engine.build(top / "other weights", "v2_13b", tp_size=2)
    tiny_engine.build(top / "one rank", "v1_7b")
    return {name: top / name for name in ("first", "copy", "other limits", "other weights", "one rank", "nothing")}


def sentences(folders, opened) -> list[str]:
    """What opened(folder, comm) raises on each rank, which opens the folder of its number."""

    def on_rank(comm) -> str:
        with pytest.raises(EngineError) as error:
            opened(folders[comm.rank], comm)
        return str(error.value)

    return run_ranks(len(folders), on_rank, timeout_s=60)


def test_copies_of_an_engine_are_the_same_wherever_they_are(engines):
    found = run_ranks(2, lambda comm: read_alike(engines[("first", "copy")[comm.rank]], comm))
    assert [each.folder for each in found] == [engines["first"], engines["copy"]]
    assert found[0] == replace(found[1], folder=engines["first"]) and found[0].digest == found[1].digest


@pytest.mark.parametrize("name", ["other limits", "other weights", "one rank"])
def test_ranks_with_different_engines_are_refused_on_every_rank(engines, name):
    same, other = engines["first"], engines[name]
    found = sentences([same, same, other], read_alike)
    assert len(set(found)) == 1 and found[0].startswith(f"{other} of rank 2 on ")
    assert f"is another engine than {same} of rank 0 on " in found[0]
    assert all(read_engine(folder).digest[:12] in found[0] for folder in (same, other))
    assert sentences([same, other], open_session) == [found[0].replace("rank 2", "rank 1")] * 2


@pytest.mark.parametrize("order", [("first", "nothing"), ("nothing", "first")])
def test_a_rank_without_the_engine_ends_every_rank(engines, order):
    lost = order.index("nothing")
    found = sentences([engines[name] for name in order], read_alike)
    assert found[lost].startswith(str(engines["nothing"])) and "build an engine" in found[lost]
    assert found[1 - lost].startswith(f"rank {lost} on ") and found[1 - lost].endswith(
        f" cannot use its engine: {found[lost]}"
    )
