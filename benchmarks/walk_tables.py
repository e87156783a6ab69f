"""The tables of docs/walk.md: python benchmarks/walk_tables.py --write walk.json ...

Takes what benchmarks/walk.py remembered of one walk or of several; commands on machines of one kind make one table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.errors import ConfigError
from baichuan.parallel.comm import Communicator
from baichuan.util.files import atomic_path

STATE = "walk.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "walk.md"
BEGIN, END = "<!-- made by benchmarks/walk_tables.py -->\n", "<!-- end of the tables -->\n"


@dataclass(frozen=True)
class Line:
    """The result of a command, as a table shows it."""

    machine: str  # the model, the GPUs, PyTorch and the cores, which head the table
    name: str
    command: str
    seconds: float
    host_gb: float
    gpu_gb: float
    written_gb: float
    said: str  # the measurements in its output


def tables(lines: Sequence[Line]) -> str:
    """Markdown, one table for each kind of machine; of a command that ran twice the later line."""
    machines: dict[str, dict[str, Line]] = {}
    for line in lines:
        machines.setdefault(line.machine, {})[line.name] = line
    head = ["| command | s | host GB | GPU GB | written GB | it says |", "|---|---:|---:|---:|---:|---|"]
    return "\n".join(
        "\n".join([f"## {machine}", "", *head, *map(row, by_name.values()), ""])
        for machine, by_name in machines.items()
    )


def row(line: Line) -> str:
    gigabytes = " | ".join(
        f"{each:.1f}" if each >= 0.05 else "" for each in (line.host_gb, line.gpu_gb, line.written_gb)
    )
    return f"| {line.name} | {line.seconds:.1f} | {gigabytes} | {line.said} |"


def read_lines(path: Path) -> list[Line]:
    """Raises ConfigError for what write_lines() did not write."""
    try:
        return [Line(**each) for each in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not what this walk.py writes ({error}); walk again") from None


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False), "utf-8")


def with_tables(text: str, new: str) -> str:
    """`text` with what stands between its marks replaced."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + new + END + rest.partition(END)[2]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.partition(":")[0])
    parser.add_argument("files", nargs="+", type=Path, help=f"each a {STATE}")
    parser.add_argument("--write", action="store_true", help="put them into docs/walk.md; else they are printed")
    return run_script(parser, argv, run)


def run(args: argparse.Namespace, comm: Communicator) -> int:
    new = tables([line for path in args.files for line in read_lines(path)])
    if not args.write:
        print(new)
        return 0
    with atomic_path(PAGE) as path:
        path.write_text(with_tables(PAGE.read_text("utf-8"), new), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
