"""The tables that say how the kernels cut products up: candidates for their entries, and the choice by measured times.

An example.  Point("v2_13b", "int8", "down", 4) is the product of 4 tokens with the INT8 down_proj of v2_13b.  As 16-bit
integers the tokens are 8 rows, so that the kernel looks its tile up at the place ("tiles", "bytes", 8), which is
tiles.TILES["bytes"] for at most 8 rows.  The entry there is (8, 64, 256, 4, 4, 264), a Tile's numbers up to its
max_programs.  Many points share a place.  They are all timed with the present entry and with other candidates, and the
place gets the entry with the least time over all of them.

What is timed for a tile is its first five numbers and, in place of max_programs, the splits that follow from it for the
product's shape: several entries may be timed as one.  An entry of a GEMV is a GemvBlock's three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product

from baichuan.config import PRESETS
from baichuan.executors.cuda import linear as cuda_linear
from baichuan.kernels import gemv, gemv_int, tiles
from baichuan.kernels.spec import GemvBlock
from benchmarks.product_cases import matrices
from benchmarks.random_weights import PRECISIONS

Entry = tuple[int, ...]
Place = tuple[str, str, int | str | None]  # module, and the two keys of an entry in its table
Cut = tiles.Tile | GemvBlock
Cuts = Sequence[tuple[int | None, Cut]] | Mapping[str, Cut]  # of one kind: by the largest size, or by weights' numbers
LIBRARY: Entry = ()  # PyTorch's product, of a dequantised copy where the matrix is quantised
MARGIN = 0.01  # a candidate is chosen if it is faster by more than this: times vary by less from run to run

TABLES: dict[str, Mapping[str, Cuts]] = {"tiles": tiles.TILES, "gemv": gemv.BLOCKS, "gemv_int": gemv_int.BLOCKS}
NUMBERS = {"int8": "int8", "smooth_quant_per_token": "w8a8", "int4": "int4", "int4_per_channel": "int4"}
SHAPES = {"qkv": "tall", "o_proj": "square", "gate_up": "gated", "down": "wide"}
ROW_LIMITS = {"GEMM_ROWS": "int4", "INT16_ROWS": "int8", "DENSE_ROWS": "float16"}  # the precision whose times set it
# Tokens that are timed; x as 16-bit integers (operand.Int16) has two rows for each.
ROWS = {
    "float16": (1, 4, 16, 32, 64, 128, 256),
    "int8": (1, 4, 8, 16, 32, 64, 256, 1024, 1536, 2048),
    "int4": (1, 4, 16, 32, 64, 128, 256),
    "int4_per_channel": (1, 64),
    **dict.fromkeys(("int4_g64", "int4_g128", "int4_zeros", "int4_g64_zeros", "int4_g128_zeros"), (64,)),
    "smooth_quant_per_token": (1, 4, 16, 32, 64, 128, 256, 1024),
    "fp8": (1, 4, 16, 32, 64, 128, 1024),
}


def _blocks(rows: Iterable[int], cuts: Iterable[tuple[int, int]]) -> tuple[Entry, ...]:
    return tuple((block_n, *cut) for block_n, cut in product(rows, cuts))


# Candidates beside the present entries, by module and first key.  Triton 3.6 compiles each for compute capability 9.0.
PROGRAMS = (132, 264, 528)
BLOCKS = {
    ("gemv", "gated"): _blocks((1, 2, 4), ((512, 2), (512, 4), (2048, 8))),
    ("gemv", "plain"): _blocks((1, 2, 4, 8), ((512, 4), (1024, 4), (2048, 8))),
    ("gemv_int", "gated"): _blocks((1, 2, 4), ((128, 1), (256, 1), (256, 2), (512, 4), (1024, 8))),
    **dict.fromkeys(
        (("gemv_int", shape) for shape in ("tall", "wide", "square")),
        _blocks((1, 2, 4, 8), ((128, 1), (256, 1), (256, 2), (512, 4), (1024, 8))),
    ),
}
TILES: dict[tuple[str, int | str | None], tuple[Entry, ...]] = {
    ("bytes", 8): ((8, 64, 256, 4, 3), (8, 128, 256, 8, 4), (8, 64, 128, 4, 6)),
    ("bytes", 16): ((16, 64, 128, 4, 6), (16, 128, 256, 8, 4), (16, 32, 512, 4, 3)),
    ("bytes", 32): ((32, 128, 256, 8, 4), (32, 128, 128, 4, 6), (32, 64, 128, 4, 6)),
    ("bytes", 64): ((64, 64, 256, 4, 3), (64, 128, 128, 4, 4), (64, 128, 128, 8, 4)),
    ("bytes", 128): ((128, 128, 128, 8, 4), (64, 64, 128, 4, 5), (128, 128, 128, 4, 3)),
    ("bytes", None): ((128, 128, 128, 8, 4), (64, 256, 128, 8, 3), (256, 128, 128, 8, 3)),
    ("converted", 8): ((8, 64, 256, 2, 4), (8, 128, 128, 2, 3), (8, 64, 128, 2, 4)),
    ("converted", 16): ((16, 32, 256, 2, 4), (16, 64, 128, 2, 4), (16, 128, 128, 2, 3)),
    ("converted", 32): ((32, 32, 256, 2, 3), (32, 64, 128, 2, 4), (32, 64, 256, 4, 3)),
    ("converted", 64): ((64, 64, 128, 4, 3), (64, 64, 256, 4, 3), (64, 128, 64, 4, 4)),
    ("converted", None): ((128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4)),
    ("int4_g32", 64): ((64, 64, 128, 4, 3), (64, 64, 256, 4, 3), (64, 128, 128, 8, 3), (64, 128, 64, 8, 4)),
    ("int4_g32_one_wave", 64): ((64, 64, 128, 4, 4), (64, 64, 256, 4, 3), (64, 128, 128, 8, 3)),
    ("int4_g64", 64): ((64, 64, 128, 4, 4), (64, 64, 256, 4, 4), (64, 128, 128, 8, 3)),
    ("int4_g128", 64): ((64, 64, 128, 4, 4), (64, 64, 256, 4, 4), (64, 128, 128, 8, 3)),
    ("int4_g32_zeros", 64): ((64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (64, 128, 128, 8, 3)),
    ("int4_g64_zeros", 64): ((64, 64, 128, 4, 4), (64, 64, 256, 4, 3), (64, 128, 64, 8, 4)),
    ("int4_g128_zeros", 64): ((64, 64, 128, 4, 4), (64, 128, 64, 8, 4), (64, 128, 128, 8, 3)),
    ("dense", 8): ((8, 128, 128, 4, 4), (8, 64, 128, 4, 5), (8, 128, 256, 8, 3)),
    ("dense", 16): ((16, 64, 256, 4, 4), (16, 128, 128, 8, 4), (16, 64, 64, 4, 8)),
    ("dense", 32): ((32, 64, 128, 4, 4), (32, 128, 128, 8, 4), (32, 128, 64, 4, 6)),
    ("dense", 64): ((64, 64, 128, 4, 4), (64, 128, 128, 4, 3), (64, 128, 128, 8, 4)),
    ("narrow", 64): ((64, 128, 64, 4, 6), (64, 64, 128, 4, 4), (64, 64, 64, 4, 6)),
    ("dense", None): ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4)),
}


@dataclass(frozen=True)
class Point:
    """One product that is timed."""

    version: str
    precision: str  # one of ROWS
    matrix: str  # one of product_cases.matrices
    rows: int  # tokens

    @property
    def shape(self) -> tuple[int, int]:
        return matrices(PRESETS[self.version])[self.matrix]

    @property
    def x_rows(self) -> int:
        return 2 * self.rows if self.precision == "int8" and self.rows > 1 else self.rows

    @property
    def place(self) -> Place:
        """Where the kernels look the entry up."""
        if self.rows == 1 and self.precision in NUMBERS:
            return "gemv_int", SHAPES[self.matrix], NUMBERS[self.precision]
        if self.rows == 1 and self.precision != "fp8":  # FP8 uses tensor cores for one row, too
            gated = self.matrix == "gate_up"
            kind, size = "gated" if gated else "plain", self.shape[0] // (2 if gated else 1)
            return "gemv", kind, _limit(gemv.BLOCKS[kind], size)
        return "tiles", self.kind, _limit(tiles.TILES[self.kind], self.x_rows)

    @property
    def kind(self) -> str:
        """The key of tiles.TILES under which the product's tiles are."""
        quant, (out_features, in_features) = PRECISIONS[self.precision], self.shape
        match quant.weights:
            case "none":
                return tiles.dense_kind(self.x_rows, in_features, out_features)
            case "int4":
                return tiles.int4_kind(self.x_rows, out_features, quant.group_size or in_features, quant.zero_points)
        return "bytes"


Times = Mapping[Point, Mapping[Entry, float | None]]  # seconds; None = a wrong or failing candidate


def _limit(table: Iterable[tuple[int | None, object]], size: int) -> int | None:
    return next(limit for limit, _ in table if limit is None or size <= limit)


def points(versions: Iterable[str], gluon: bool = False) -> list[Point]:
    """The products of these versions, with few rows first: most of a generation's time is theirs.

    gluon: whether W8A8 of many rows is gemm_int8.py's, which has no tables here
    """
    every = [
        Point(version, precision, matrix, rows)
        for version in versions
        for precision, several in ROWS.items()
        for rows in several
        for matrix in matrices(PRESETS[version])
        if matrix != "head" or (precision == "float16" and rows == 1)
        if not (gluon and precision == "smooth_quant_per_token" and rows >= cuda_linear.GLUON_ROWS)
    ]
    return sorted(every, key=lambda point: point.rows)


def present(place: Place) -> Entry:
    module, first, second = place
    return astuple(_by_key(TABLES[module][first])[second])[:6]


def _by_key(cuts: Cuts) -> dict[int | str | None, Cut]:
    return dict(cuts.items() if isinstance(cuts, Mapping) else cuts)


def candidates(point: Point) -> tuple[Entry, ...]:
    """What is timed for a point, the present entry first; LIBRARY last where a row limit decides between the two."""
    module, kind, limit = place = point.place
    if module != "tiles":
        return tuple(dict.fromkeys((present(place), *BLOCKS[module, kind])))
    entries = (present(place), *_with_programs(TILES.get((kind, limit), ())))
    own = dict.fromkeys(_timed(point, entry) for entry in entries)
    return (*own, LIBRARY) if point.precision in ROW_LIMITS.values() else tuple(own)


def _with_programs(cuts: Iterable[Entry]) -> list[Entry]:
    """Tiles' first five numbers with each max_programs."""
    return [(*cut, programs) for cut, programs in product(dict.fromkeys(cuts), PROGRAMS)]


def _timed(point: Point, entry: Entry) -> Entry:
    """What is timed for a table's entry: of a tile, the first five numbers and the splits that the kernel would use."""
    if point.place[0] != "tiles":
        return entry
    out_features, in_features = point.shape
    return (*entry[:5], tiles.split(tiles.Tile(*entry), point.x_rows, in_features, out_features).splits)


def _relative(pairs: Iterable[tuple[Point, float, float]]) -> float:
    """The ratio of a layer's first times to its second times, mean over layers.  pairs: (point, first, second time)"""
    layers: dict[tuple, list[tuple[float, float]]] = {}
    for point, first, second in pairs:
        layers.setdefault((point.version, point.precision, point.rows), []).append((first, second))
    ratios = [sum(first for first, _ in layer) / sum(second for _, second in layer) for layer in layers.values()]
    return sum(ratios) / len(ratios)


def _right(timed: Mapping[Entry, float | None]) -> dict[Entry, float]:
    """The times of our kernels' correct candidates."""
    return {entry: time for entry, time in timed.items() if entry != LIBRARY and time is not None}


def _cost(times: Times, entry: Entry) -> float:
    """The time that one place's products take by this entry, relative to each one's best.

    Infinite where the entry is wrong for a product or was not timed with it.
    """
    if any(time is None and each[:5] == entry[:5] for timed in times.values() for each, time in timed.items()):
        return math.inf
    right = {point: _right(timed) for point, timed in times.items()}
    return _relative(
        (point, timed.get(_timed(point, entry), math.inf), min(timed.values(), default=1.0))
        for point, timed in right.items()
    )


def _best(now, costs: Mapping):
    """The option that costs least; `now`, the present one, if that gains no more than MARGIN."""
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] < (1 - MARGIN) * costs[now] else now


@dataclass(frozen=True)
class Choice:
    entries: dict[Place, Entry]  # entries of the places that were measured
    row_limits: dict[str, int]
    report: tuple[str, ...]  # a line for each decision


def choose(times: Times) -> Choice:
    """The best entries by these times; present values where the times decide nothing."""
    places: dict[Place, dict[Point, Mapping[Entry, float | None]]] = {}
    for point, timed in times.items():
        places.setdefault(point.place, {})[point] = timed
    chosen, report = {}, []
    for place, own in places.items():
        now, costs = present(place), {entry: _cost(own, entry) for entry in _entries(place, own)}
        chosen[place] = entry = _best(now, costs)
        gain = _gain(costs[now], costs[entry])
        report.append(f"{' '.join(map(str, place)):24s} {now!s:30s} {entry!s:30s} {gain} {len(own):3d} products")
    limits = {name: _row_limit(times, name, chosen) for name in ROW_LIMITS}
    report += [f"{name:24s} {getattr(cuda_linear, name):<30d} {value:<30d}" for name, value in limits.items()]
    return Choice(chosen, limits, tuple(report))


def _entries(place: Place, times: Times) -> list[Entry]:
    """The present entry, and every other that could stand at this place and was timed."""
    timed = [entry for each in times.values() for entry in each if entry]
    known = timed if place[0] != "tiles" else _with_programs(entry[:5] for entry in timed)
    return list(dict.fromkeys([present(place), *known]))


def _gain(now: float, best: float) -> str:
    """The share of time that the best entry saves, as text."""
    return f"{100 * (1 - best / now):+6.1f} %" if 0 < now < math.inf else " unknown"


def _row_limit(times: Times, name: str, chosen: Mapping[Place, Entry]) -> int:
    """The largest number of rows at which our kernel is faster than the library, among those with both times."""
    pairs: dict[int, list[tuple[Point, float, float]]] = {}
    for point, timed in times.items():
        library = timed.get(LIBRARY)
        if point.precision == ROW_LIMITS[name] and library is not None:
            own = _right(timed).get(_timed(point, chosen[point.place]), math.inf)
            pairs.setdefault(point.rows, []).append((point, own, library))
    known, now = 0, getattr(cuda_linear, name)
    for rows in sorted(pairs):
        if _relative(pairs[rows]) > 1 + (MARGIN if rows <= now else -MARGIN):
            return now if known <= now < rows else known
        known = rows
    return max(now, known)


def tables_text(choice: Choice) -> str:
    """The tables as Python, for `ruff format` to lay out."""
    lines = []
    for module, table in TABLES.items():
        lines += [f"# baichuan/kernels/{module}.py", f"{'TILES' if module == 'tiles' else 'BLOCKS'} = {{"]
        for first, entries in table.items():
            cuts = {
                second: type(cut)(*choice.entries.get((module, first, second), astuple(cut)[:6]))
                for second, cut in _by_key(entries).items()
            }
            lines.append(f'    "{first}": {_literal(cuts if isinstance(entries, dict) else tuple(cuts.items()))},')
        lines.append("}")
    lines.append("# baichuan/executors/cuda/linear.py")
    return "\n".join(lines + [f"{name} = {value}" for name, value in choice.row_limits.items()])


def _literal(value) -> str:
    if isinstance(value, Cut):
        return f"{type(value).__name__}({', '.join(map(str, astuple(value)[:6]))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + (",)" if len(value) == 1 else ")")
    return f'"{value}"' if isinstance(value, str) else str(value)
