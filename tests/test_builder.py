"""Building an engine: what it made is checked, and a failure leaves the old one."""

import os
import signal
from dataclasses import replace
from functools import partial

import goldens
import pytest
import scripts
import tiny_engine
import torch
from tiny_engine import snapshot

import build
import weight
from baichuan.cli.build import self_checker
from baichuan.config import BACKEND_NAMES, BuildConfig, QuantConfig
from baichuan.engine import builder, self_check
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.runtime import open_executor, open_session
from baichuan.errors import EngineError, UnsupportedError
from baichuan.executors import torch_backend
from baichuan.executors.registry import BACKENDS
from baichuan.parallel.comm import Solo
from baichuan.util import manifest
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.rank_tensors import TensorBlocks, total_bytes
from baichuan.weights.tensor_file import write_tensors

VERSION = "v1_7b"


@pytest.fixture
def folder(tmp_path):
    tiny_engine.build(tmp_path / "engine", VERSION)
    return tmp_path / "engine"


def request(folder, version=VERSION, weights="none", tp_size=1, change=None, **more):
    """A request for the golden checkpoint's engine; change(rank, plan) may spoil it."""
    source, quant = weight.WeightSource(goldens.checkpoint(version)), QuantConfig(weights)
    model = read_model_config(source.hub_folder, version, "float32")
    rank_tensors = partial(weight.rank_tensors, source, model, quant, tp_size=tp_size)
    limits = BuildConfig(tp_size, **tiny_engine.LIMITS)
    return BuildRequest(folder, model, quant, limits, change or rank_tensors, **more), source


def test_every_backend_that_a_config_can_name_is_registered():
    assert {name: backend.name for name, backend in BACKENDS.items()} == {name: name for name in BACKEND_NAMES}


# What fails leaves the old engine and nothing else


@pytest.mark.parametrize(
    ("module", "function"),
    [(torch_backend, "write_tensors"), (builder, "write_config"), (builder, "publish")],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_build_that_fails_leaves_the_old_engine(folder, monkeypatch, module, function):
    before = snapshot(folder)

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(OSError, match=str(folder)):
        tiny_engine.build(folder, "v2_13b", tp_size=2)
    assert snapshot(folder) == before
    open_session(folder, Solo(), VERSION)


def test_a_process_that_is_killed_leaves_the_old_engine(folder):
    before = snapshot(folder)
    asked, _ = request(folder, tp_size=2, parallel=True, change=plan_or_die)
    with pytest.raises(UnsupportedError, match="one of 2 processes was killed.* leave --parallel_build out"):
        build_engine(asked)
    assert snapshot(folder) == before


def plan_or_die(rank):
    """A plan whose second rank's process is killed when it writes."""
    asked, _ = request(None, tp_size=2)
    return [replace(item, blocks=die) for item in asked.rank_tensors(rank)] if rank == 1 else asked.rank_tensors(rank)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_planned_is_what_is_written_and_reported(tmp_path):
    asked, _ = request(tmp_path, weights="int8")
    plan, sizes, spans, path = asked.rank_tensors(0), [], [], tmp_path / "file"

    def wrote(start, size):
        assert path.stat().st_size >= start + size
        spans.append((start, start + size))

    write_tensors(path, plan, sizes.append, wrote)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(sizes) == total_bytes(plan) == path.stat().st_size - 8 - header
    starts, ends = zip(*sorted(spans), strict=True)
    assert starts == (0, *ends[:-1]) and ends[-1] == path.stat().st_size


@pytest.mark.parametrize("parallel", [False, True])
def test_the_engine_lists_what_its_files_are(tmp_path, monkeypatch, parallel):
    if not parallel:  # the other processes have the real size, which is larger than this engine
        monkeypatch.setattr(manifest, "CHUNK_BYTES", 1 << 20)
    engine = build_engine(request(tmp_path, weights="int8", tp_size=2, parallel=parallel)[0])
    assert engine.files == {name: manifest.describe(tmp_path / name) for name in engine.files}
    assert len(engine.files) == 2 and all(len(each["sha256"]) > 1 or parallel for each in engine.files.values())


# The self-check


def agreement(engine, source):
    ids = self_check.default_ids(engine.model.vocab_size)
    expected = self_check.float_logits(weight.float_model(source, engine.model), ids)
    return self_check.check_engine(engine, lambda comm: open_executor(engine, comm), expected, ids)


@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("weights", "kl", "top1"),
    [
        ("none", 1e-6, 1.0),  # float32's sums
        ("int8", 0.01, 0.75),  # random weights have close seconds
        ("int4", 1.5, 0.1),  # and no structure that 15 levels a channel could keep; by chance they agree at 0.001
    ],
)
def test_good_engines_agree_with_their_checkpoint(tmp_path, version, tp_size, weights, kl, top1):
    asked, source = request(tmp_path, version, weights, tp_size)
    found = agreement(build_engine(asked), source)
    assert found.kl <= kl and found.top1 >= top1
    assert (found.kl > 1e-6) == (weights != "none")


def test_the_divergence_is_pytorchs():
    p, q = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q))).mean()
    found = self_check.Agreement.of(p, q)
    assert found.kl == pytest.approx(expected.item(), rel=1e-12)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean()


def spoilt(spoil, tp_size, rank):
    asked, _ = request(None, tp_size=tp_size)
    return spoil(asked.rank_tensors, rank, tp_size)


def rolled_head(rank_tensors, rank, _):
    """lm_head's rows one off, so that each token gets its neighbour's logit."""
    *rest, head = rank_tensors(rank)

    def blocks():
        rows = torch.cat([block["lm_head.weight"] for block in head.blocks()])
        yield {"lm_head.weight": rows.roll(1, 0)}

    return [*rest, TensorBlocks(head.specs, blocks)]


def not_a_number(rank_tensors, rank, _):
    *rest, norm, head = rank_tensors(rank)
    [block] = norm.blocks()
    return [*rest, replace(norm, blocks=lambda: [{"norm": block["norm"] * torch.nan}]), head]


def test_an_engine_of_another_version_is_refused(tmp_path):
    """The check reads the checkpoint as what it is, whatever the build took it for."""
    asked, source = request(tmp_path, "v2_13b")
    taken_for = replace(asked.model, model_version="v1_13b")
    rank_tensors = partial(weight.rank_tensors, source, taken_for, asked.quant, tp_size=1)
    with pytest.raises(EngineError, match=r"mean KL of 1\d nats"):
        build_engine(replace(asked, model=taken_for, rank_tensors=rank_tensors), self_checker(source, taken_for))
    assert not list(tmp_path.iterdir())


def swapped_ranks(rank_tensors, rank, tp_size):
    return rank_tensors((rank + 1) % tp_size)


FAR_OFF = r"mean KL of \d+\.?\d* nats.*--no_self_check"


@pytest.mark.parametrize(
    ("spoil", "tp_size", "said"),
    [(rolled_head, 1, FAR_OFF), (not_a_number, 1, "norm holds a NaN or an infinity"), (swapped_ranks, 2, FAR_OFF)],
)
def test_a_bad_engine_is_refused_and_leaves_the_old_one(folder, spoil, tp_size, said):
    before = snapshot(folder)
    asked, source = request(folder, tp_size=tp_size, change=partial(spoilt, spoil, tp_size))
    with pytest.raises(EngineError, match=said) as error:
        build_engine(asked, self_checker(source, asked.model))
    assert "\n" not in str(error.value)
    assert snapshot(folder) == before
    build_engine(asked)  # unchecked, it is written
    assert snapshot(folder) != before


def test_the_check_fits_the_shortest_engine(tmp_path, capsys):
    flags = scripts.build_flags(tmp_path, VERSION, "--max_input_len", "1", "--max_output_len", "1")
    assert build.main(flags) == 0
    assert "same first choice at 100.0 %" in capsys.readouterr().err


def test_a_check_without_memory_for_it_is_skipped_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("baichuan.cli.build.fits_host_memory", lambda _: False)
    assert build.main(scripts.build_flags(tmp_path, VERSION)) == 0
    assert "self-check skipped: the float32 weights take 0.0 GB of memory" in capsys.readouterr().err
    open_session(tmp_path, Solo(), VERSION)
