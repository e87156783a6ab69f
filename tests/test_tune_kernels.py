"""Choosing the kernels' cuts from made-up times, and the check of candidates in Triton's interpreter."""

from argparse import Namespace
from dataclasses import astuple

import pytest
import torch
from kernel_device import DEVICE, MARKS

from baichuan.config import PRESETS
from baichuan.executors.cuda import linear as cuda_linear
from baichuan.kernels import gemv, gemv_int, tiles
from baichuan.kernels.spec import GemvBlock
from benchmarks import tune_kernels, tune_tables
from benchmarks.kernel_cases import small_sizes
from benchmarks.product_cases import product_case
from benchmarks.random_weights import PRECISIONS
from benchmarks.tune_tables import LIBRARY, PROGRAMS, Point, candidates, choose, points, present

pytestmark = MARKS

VERSIONS = ("v2_13b", "v1_7b")
TALL = ("gemv_int", "tall", "int8")
CONVERTED = ("tiles", "converted", 16)


def made_up(time=lambda point, entry: 2e-5, only=lambda point: True):
    """Times of all candidates; the library takes twice as long."""
    return {
        point: {entry: 4e-5 if entry == LIBRARY else time(point, entry) for entry in candidates(point)}
        for point in points(VERSIONS)
        if only(point)
    }


def changes(choice):
    """The entries that differ from the present ones by place, without a tile's max_programs."""
    return {place: entry[:5] for place, entry in choice.entries.items() if entry[:5] != present(place)[:5]}


def test_what_another_kernel_multiplies_is_not_timed():
    left = set(points(VERSIONS)) - set(points(VERSIONS, gluon=True))
    assert {point.precision for point in left} == {"smooth_quant_per_token"}
    assert {point.rows for point in left} == {64, 128, 256, 1024}


def test_places_and_splits_are_the_kernels_own(monkeypatch):
    for number, blocks in enumerate(gemv_int.BLOCKS.values()):
        for other, kind in enumerate(blocks):
            monkeypatch.setitem(blocks, kind, GemvBlock(8, 128 + number, other))  # no two alike
    for number, kind in enumerate(kind for kind in tiles.TILES if kind.startswith("int4")):
        monkeypatch.setitem(tiles.TILES, kind, ((64, tiles.Tile(64, 64, 128, 4, 2 + number)),))
    types = {
        "int8": (torch.int8, torch.int8),
        "int4": (torch.float16, torch.uint8),
        "smooth_quant": (torch.int8, torch.int8),
        "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn),
        "none": (torch.float16, torch.float16),
    }
    for point in points(VERSIONS):
        (out_features, in_features), gated = point.shape, point.matrix == "gate_up"
        rows = out_features // 2 if gated else out_features
        kernel, _, kind = point.place
        if point.rows > 1 or point.precision == "fp8":
            quant = PRECISIONS[point.precision]
            groups = (quant.group_size or in_features, quant.zero_points) if quant.weights == "int4" else None
            tile = tiles.choose_tile(point.x_rows, in_features, out_features, *types[quant.weights], groups)
            expected = (*astuple(tile)[:5], tile.splits)
        else:
            own = kernel == "gemv_int"
            block = gemv_int.choose_block(in_features, rows, kind, gated) if own else gemv.choose_block(rows, gated)
            expected = (block.block_n, block.block_k, block.num_warps)
        assert candidates(point)[0] == expected, point


def test_without_times_and_with_equal_times_everything_stays():
    for times in ({}, made_up()):
        choice = choose(times)
        assert not changes(choice)
        assert all(getattr(cuda_linear, name) <= value for name, value in choice.row_limits.items())


def test_the_fastest_is_chosen_where_it_was_measured_and_pasted_text_says_so():
    def time(point, entry):
        fast = {TALL: (8, 512, 4), CONVERTED: (16, 64, 128, 2, 4)}
        return 1e-5 if fast.get(point.place) == entry[:5] else 2e-5

    choice = choose(made_up(time, only=lambda point: point.place[0] == "gemv_int"))
    assert changes(choice) == {TALL: (8, 512, 4)}  # a class without measurements keeps its entry
    assert any("tall int8" in line and "+50.0 %" in line for line in choice.report)
    choice = choose(made_up(time))
    assert changes(choice) == {TALL: (8, 512, 4), CONVERTED: (16, 64, 128, 2, 4)}
    tiles_text, _, rest = tune_tables.tables_text(choice).partition("# baichuan/kernels/gemv.py")
    gemv_text, _, rest = rest.partition("# baichuan/kernels/gemv_int.py")
    read = {"Tile": tiles.Tile, "GemvBlock": GemvBlock}
    exec(tiles_text, read)
    assert dict(read["TILES"]["converted"])[16] == tiles.Tile(16, 64, 128, 2, 4, min(PROGRAMS))
    assert {**read["TILES"], "converted": ()} == {**tiles.TILES, "converted": ()}
    exec(gemv_text, read)
    assert read["BLOCKS"] == gemv.BLOCKS
    exec(rest, read)
    assert read["BLOCKS"]["tall"] == {**gemv_int.BLOCKS["tall"], "int8": GemvBlock(8, 512, 4)}


@pytest.mark.parametrize("place, entry", [(TALL, (8, 512, 4)), (CONVERTED, (16, 64, 128, 2, 4))])
def test_a_candidate_that_is_wrong_once_or_not_measured_everywhere_is_never_chosen(place, entry):
    times = made_up(lambda point, each: 1e-6 if each[:5] == entry and point.place == place else 2e-5)
    assert changes(choose(times)) == {place: entry}
    point, timed = next((point, timed) for point, timed in times.items() if point.place == place)
    wrong = {each: None if each[:5] == entry else time for each, time in timed.items()}
    assert not changes(choose({**times, point: wrong}))
    missing = {each: time for each, time in timed.items() if each[:5] != entry}
    assert not changes(choose({**times, point: missing}))


def test_a_wrong_present_entry_is_replaced_and_a_gain_of_noise_is_not_taken():
    now = present(TALL)
    replaced = changes(choose(made_up(lambda point, entry: None if (point.place, entry) == (TALL, now) else 2e-5)))
    assert list(replaced) == [TALL] and replaced[TALL] != now
    assert not changes(choose(made_up(lambda point, entry: 2e-5 if entry == present(point.place) else 1.985e-5)))


@pytest.mark.parametrize("better, exponent", [(max, -1), (min, 1)])
def test_as_many_programs_are_allowed_as_are_fast(better, exponent):
    times = made_up(lambda point, entry: 2e-5 * entry[5] ** exponent, only=lambda point: point.place[0] == "tiles")
    assert {entry[5] for entry in choose(times).entries.values()} == {better(PROGRAMS)}


@pytest.mark.parametrize(
    "faster, measured, expected",
    [
        ((4, 16, 32, 64, 128), 256, 128),
        ((4, 16, 32, 64, 128, 256), 256, 256),
        ((4, 16, 32, 128, 256), 256, 32),
        ((4, 16, 32), 32, cuda_linear.GEMM_ROWS),  # nothing says that more rows are slower
        ((), 256, 0),
    ],
)
def test_more_rows_than_the_kernel_is_faster_for_are_left_to_the_library(faster, measured, expected):
    times = made_up(
        lambda point, entry: 2e-5 if point.rows in faster else 6e-5,
        only=lambda point: point.precision == "int4" and point.rows <= measured,
    )
    limits = choose(times).row_limits
    assert limits == {"GEMM_ROWS": expected, "INT16_ROWS": cuda_linear.INT16_ROWS, "DENSE_ROWS": cuda_linear.DENSE_ROWS}


SMALL = small_sizes(PRESETS["v2_13b"]).model
BLOCK, TILE = (32, 32, 1), (16, 64, 64, 1, 2, 2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", ["float16", "int8", "int4", "int4_zeros", "smooth_quant_per_token", "fp8"])
def test_every_product_is_checked_as_the_kernel_computes_it(precision, rows):
    case = product_case(SMALL, DEVICE, precision, "gate_up", rows)
    operands = case.make(0)
    run, expected = tune_kernels.bound(*operands, "gate_up"), case.expected(*operands)
    entries = [BLOCK if rows == 1 and precision != "fp8" else TILE] + [LIBRARY] * (
        rows > 1 and precision in ("float16", "int8", "int4", "int4_zeros")
    )
    for entry in entries:
        assert tune_kernels.wrong(run, entry, expected, case.tolerance) == ""
        assert "relative error" in tune_kernels.wrong(run, entry, expected * 1.02, case.tolerance)
    assert "fails: " in tune_kernels.wrong(run, (3, *entries[0][1:]), expected, case.tolerance)  # no power of two
    changing = iter((expected, expected * (1 + 1e-6)))
    assert "two runs differ" in tune_kernels.wrong(lambda entry: next(changing), entry, expected, case.tolerance)


@pytest.fixture
def on_small_matrices(monkeypatch):
    """measure() without a GPU: small products, no times but 1 ms."""
    monkeypatch.setattr(
        tune_kernels, "_case", lambda point: product_case(SMALL, DEVICE, point.precision, point.matrix, point.rows)
    )
    monkeypatch.setattr(tune_kernels, "MAX_COPIES", 2)
    monkeypatch.setattr(tune_kernels, "seconds", lambda calls, replays: [call() for call in calls] and 1e-3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune_kernels, "points", lambda versions, gluon: [POINT])


POINT = Point("v2_13b", "int4", "o_proj", 1)


def test_a_candidate_that_computes_something_else_has_no_time(on_small_matrices, monkeypatch, capsys):
    right, bad = tune_kernels.gemv_int, (64, 32, 1)
    monkeypatch.setattr(tune_kernels, "candidates", lambda point: (BLOCK, bad))

    def kernel(*args, block, zero):
        return right(*args, block=block, zero=zero) * (1.5 if block == GemvBlock(*bad) else 1)

    monkeypatch.setattr(tune_kernels, "gemv_int", kernel)
    arguments = Namespace(model_version=["v2_13b"], precision=list(tune_tables.ROWS), seconds=600, compile_threads=1)
    times = dict(tune_kernels.measure(arguments))
    assert times == {POINT: {BLOCK: 1e-3, bad: None}}
    assert "(64, 32, 1): is wrong" in capsys.readouterr().out
    assert not list(tune_kernels.measure(Namespace(**{**vars(arguments), "seconds": 0})))


def test_times_that_were_written_are_chosen_by_without_a_gpu(tmp_path, capsys):
    file = tmp_path / "times.json"
    times = made_up(lambda point, entry: None if entry == (8, 256, 2) else 1e-5 if entry == (8, 512, 4) else 2e-5)
    tune_kernels.write_times(file, "a GPU", times)
    assert tune_kernels.read_times(file) == ("a GPU", times)
    assert tune_kernels.main(["--from_json", str(file), "--model_version", "v1_7b"]) == 0
    out = capsys.readouterr().out
    assert f"a GPU, {len(times) // 2} products timed" in out and '"tall": {"w8a8": GemvBlock(8, 512, 4)' in out


@pytest.mark.parametrize("text", ["", "[]", '{"gpu": "", "points": [{"times": [], "version": "v3"}]}'])
def test_a_file_without_times_is_refused(tmp_path, capsys, text):
    (tmp_path / "times.json").write_text(text)
    assert tune_kernels.main(["--from_json", str(tmp_path / "times.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds no times" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_timed(capsys):
    assert tune_kernels.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
