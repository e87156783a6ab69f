"""Calibrate a Baichuan checkpoint and write the folder that build.py --bin_model_dir reads:
python hf_baichuan_convert.py -i baichuan-inc/Baichuan2-13B-Chat -o OUT -sq 0.8 -t fp16"""

from __future__ import annotations

import sys

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # until main() has begun

from baichuan.cli import convert_flags
from baichuan.cli.common import Parser, run_script


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    convert_flags.add_flags(parser)
    return run_script(parser, argv, run)


def run(args, comm) -> int:
    from baichuan.cli.convert import convert_checkpoint  # imports PyTorch, which takes seconds

    return convert_checkpoint(args, comm)


if __name__ == "__main__":
    sys.exit(main())
