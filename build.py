"""Build an engine from a Baichuan checkpoint: python build.py --model_dir FOLDER --output_dir ENGINE"""

from __future__ import annotations

import sys

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # until main() has begun

from baichuan.cli import build_flags
from baichuan.cli.common import Parser, run_script


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    build_flags.add_flags(parser)
    return run_script(parser, argv, run)


def run(args, comm) -> int:
    from baichuan.cli.build import build  # imports PyTorch, which takes seconds; flags are checked before

    return build(args, comm)


if __name__ == "__main__":
    sys.exit(main())
