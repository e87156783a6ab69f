"""What the scripts share: argument parsing, logging, exit codes.

PyTorch takes seconds to import; what answers --help and wrong flags does without it.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from baichuan import __version__
from baichuan.cli.ahead import Ahead
from baichuan.cli.failures import import_torch, stopped, stopped_by, users_error
from baichuan.cli.suggest import unknown_flag
from baichuan.config import DEVICES, VERSIONS
from baichuan.errors import BaichuanError
from baichuan.parallel.launcher import launch
from baichuan.text.printable import printable, sentence
from baichuan.util.affinity import cores, leave_single_core
from baichuan.util.signals import ENDING, Terminated, end_by_exception, end_quietly, noticed, termination_raises
from baichuan.util.start import seconds_since_start, without_collections
from baichuan.util.streams import lead_nowhere, open_streams

if TYPE_CHECKING:
    from baichuan.parallel.comm import Communicator

logger = logging.getLogger(__name__)

USER_ERROR = 2
ENGINE_DIR = "engine_outputs"  # the engine folder without a flag: build.py writes it, the others read it
DUMMY_VERSION = "v1_13b"  # the model version of dummy weights without --model_version
LOG_LEVELS = ("debug", "info", "warning", "error")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where it says something: not False, None or an empty list.

    A description's paragraphs stay apart, and indented ones, which are commands, as they are.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width, break_on_hyphens=False)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default == []:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Flags(argparse.Namespace):
    """given: the names of the flags that the user gave, so that a value can be told from a default; not in vars()."""

    __slots__ = ("given",)
    given: frozenset[str]


class Parser(argparse.ArgumentParser):
    """Every script's parser: defaults in --help, one line and exit code 2 for a wrong flag, with a suggestion where
    one is likely; abbreviated flags are errors."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"Baichuan engines {__version__}")
        self.add_argument(
            "--log_level", choices=LOG_LEVELS, default="info", help="print messages of this severity and above"
        )

    def parse_args(self, args=None, namespace=None):
        """An empty value is an error: it most likely comes from a shell variable that is not set.  Returns Flags."""
        assert namespace is None, "this makes its own"
        argv = sys.argv[1:] if args is None else args
        if message := unknown_flag(argv, self._option_string_actions):
            self.error(message)
        defaults = {each.dest: each.default for each in self._actions if each.default is not argparse.SUPPRESS}
        absent = object()
        parsed = super().parse_args(argv, Flags(**dict.fromkeys(defaults, absent)))
        parsed.given = frozenset(name for name in defaults if getattr(parsed, name) is not absent)
        for name in defaults.keys() - parsed.given:
            setattr(parsed, name, defaults[name])
        for action in self._actions:
            if getattr(parsed, action.dest, None) == "" and action.dest != "system":
                self.error(f"argument {action.option_strings[0]}: its value is empty; name one or leave the flag out")
        return parsed

    def error(self, message: str):
        if re.search(r"expected .*argument", message):
            message += " (one that begins with - needs an =, as in --flag=-x)"
        self.exit(USER_ERROR, f"{self.prog}: error: {sentence(message)}; {self.prog} --help lists every flag\n")


def add_model_version(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """default None: the checkpoint or the engine knows its version, and one that is given must agree."""
    parser.add_argument("--model_version", choices=tuple(VERSIONS), default=default, help=text)


def add_device(parser: argparse._ActionsContainer, what: str) -> None:
    text = f"device that {what}; auto takes a GPU if PyTorch can use one"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=text)
    parser.add_argument(
        "--threads", type=int, help="CPU threads of each process (default: its share of the physical cores)"
    )


def check_device(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise UnsupportedError for --device cuda without a GPU; warn of a GPU that is there and cannot be used."""
    from baichuan.executors.device import resolve_device, unusable_gpu

    resolve_device(args.device)
    if comm.rank == 0 and args.device == "auto" and (reason := unusable_gpu()):
        logger.warning(
            "running on the CPU: %s; python -m baichuan.doctor says what to do, --device cpu that this is intended",
            reason,
        )


def add_group_size(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weight_only_group_size",
        type=int,
        choices=(0, 32, 64, 128),
        help="INT4: input channels per scale, 0 means all (default: 32 where that divides the share of a rank)",
    )


def add_adapters(parser: argparse._ActionsContainer, base: str) -> None:
    """base: the flag that names the checkpoint."""
    parser.add_argument(
        "--lora_dir",
        nargs="+",
        default=[],
        metavar="ADAPTER",
        help=f"LoRA adapters by PEFT, folders or hub ids, that are merged into the checkpoint of {base} in this order",
    )


Body = Callable[[argparse.Namespace, "Communicator"], int]


def run_script(
    parser: Parser,
    argv: list[str] | None,
    body: Body,
    engines: Callable[[argparse.Namespace], Iterable[str]] | None = None,
) -> int:
    """Parse, run body(args, comm), and turn what goes wrong for a user into one sentence and exit code 2.

    engines: the folders that body opens; their files' digests, begun before PyTorch is imported, are args.ahead.digests
    args.started_s is set to the time.monotonic() at which the process started, or with argv at which this was called.
    """
    called_s = time.monotonic()
    open_streams()
    try:
        end_by_exception()
        args = parser.parse_args(argv)
        args.started_s = called_s if argv is not None else time.monotonic() - seconds_since_start()
        launched = launch()
        bound = leave_single_core(launched.local_size)
        orderly = termination_raises() if launched.world_size == 1 else nullcontext()  # mpirun sends it after a failure
        with orderly, nullcontext() if engines is None else Ahead(engines(args), launched, args.device) as args.ahead:
            return _run(parser, args, body, bound)
    except BaichuanError as error:  # raised before the body: something in the environment is wrong
        message = str(error)
    except (KeyboardInterrupt, Terminated) as error:  # before the body, or a second signal while the body ends
        message = stopped(error.number if isinstance(error, Terminated) else signal.SIGINT)
    finally:
        if argv is None:  # the process leaves
            end_quietly()
    print(f"{parser.prog}: error: {sentence(message)}", file=sys.stderr, flush=True)
    return USER_ERROR


def _run(parser: Parser, args: argparse.Namespace, body: Body, bound: bool) -> int:
    """bound: whether the launcher had bound this process to one core, which it has left"""
    with nullcontext() if "torch" in sys.modules else without_collections():
        import_torch()
        import torch

        from baichuan.executors.cpu.threads import use_threads
        from baichuan.parallel.comm import world_of_this_process

    comm = world_of_this_process()
    configure_logging(args.log_level, comm)
    if bound:
        logger.info("this rank was bound to one core and runs on all %d; mpirun --bind-to none says the same", cores())
    came: list[tuple[int, float]] = []
    try:
        with noticed(*ENDING) as came:
            use_threads(getattr(args, "threads", None), comm.local_size)
            return body(args, comm)
    except BaichuanError as error:
        message = str(error)
    except (KeyboardInterrupt, Terminated) as error:
        message = stopped(error.number if isinstance(error, Terminated) else signal.SIGINT)
    except MemoryError:
        message = "the host memory is exhausted; use a smaller batch, shorter lengths or more ranks"
    except torch.OutOfMemoryError:
        message = "the GPU's memory is exhausted; use a smaller batch, shorter lengths, --max_num_tokens or more ranks"
    except BrokenPipeError:
        message = "nobody reads the output any more, which is cut off"
        lead_nowhere(sys.stdout)
    except Exception as error:
        message = stopped_by(came) or users_error(error)
        if not message:
            _leave_unexpected(comm)
            raise
    rank = f" (rank {comm.rank})" if comm.world_size > 1 else ""
    print(f"{parser.prog}: error{rank}: {sentence(message)}", file=sys.stderr, flush=True)
    comm.leave_failed()
    return USER_ERROR


def _leave_unexpected(comm: Communicator) -> None:
    """Print the current exception first under mpirun, where leaving ends all ranks at once, then leave."""
    if comm.world_size > 1:
        traceback.print_exc()
        sys.stderr.flush()
    comm.leave_failed()


def only_rank_zero(comm: Communicator, make: Callable[[], Any]) -> Any:
    """make()'s value on rank 0 and None elsewhere; its BaichuanError is raised on every rank."""
    value = failure = None
    if comm.rank == 0:
        try:
            value = make()
        except BaichuanError as error:
            failure = error
    if failure := comm.broadcast_object(failure):
        raise failure
    return value


class _Printable(logging.Formatter):
    """Control characters in file names and library messages are spelled out, so that a terminal does not obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def configure_logging(level: str, comm: Communicator) -> None:
    """Log to standard error; messages below a warning come from rank 0 alone, those of libraries from a warning on."""
    level_number = getattr(logging, level.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level_number)  # a library's logger has a level of its own
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("baichuan").setLevel(level_number if comm.rank == 0 else max(level_number, logging.WARNING))
