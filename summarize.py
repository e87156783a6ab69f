"""Measure summaries: python summarize.py --test_trt_llm --test_hf --engine_dir FOLDER --hf_model_dir CHECKPOINT"""

from __future__ import annotations

import sys

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # until main() has begun

from baichuan.cli import summarize_flags
from baichuan.cli.common import Parser, run_script


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    summarize_flags.add_flags(parser)
    return run_script(parser, argv, run, lambda args: args.engine_dir if args.test_trt_llm else [])


def run(args, comm) -> int:
    from baichuan.cli.summarize import summarize  # imports PyTorch, which takes seconds; flags are checked before

    return summarize(args, comm)


if __name__ == "__main__":
    sys.exit(main())
