"""Generate text with an engine: python run.py --engine_dir FOLDER --max_output_len 50"""

from __future__ import annotations

import sys

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # until main() has begun

from baichuan.cli import run_flags
from baichuan.cli.common import Parser, run_script


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    run_flags.add_flags(parser)
    return run_script(parser, argv, run, lambda args: [args.engine_dir])


def run(args, comm) -> int:
    # These import PyTorch, which takes seconds; flags are checked before.
    if args.prompt_file or args.output_jsonl or args.resume:
        from baichuan.cli.batch import run_file

        return run_file(args, comm)
    from baichuan.cli.generate import generate

    return generate(args, comm)


if __name__ == "__main__":
    sys.exit(main())
