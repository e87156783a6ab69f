"""What run.py --prompt_file does: a file of prompts in, a file of results out, by every replica that was started."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from baichuan.api.llm import LLM
from baichuan.api.ranks import Ranks
from baichuan.api.result_file import result_file
from baichuan.api.work import Queue, read_tasks, work
from baichuan.cli.common import USER_ERROR, check_device, only_rank_zero
from baichuan.cli.generate import check_flags, open_llm, sampling_config
from baichuan.cli.unused_flags import say_unused
from baichuan.config import SamplingConfig
from baichuan.engine.world import read_alike
from baichuan.errors import UnsupportedError
from baichuan.parallel.comm import Communicator
from baichuan.parallel.replicas import END, Asker, Replica, answered, join_replica
from baichuan.util.progress import Progress
from baichuan.util.signals import Terminated, termination_raises

logger = logging.getLogger(__name__)


def run_file(args: argparse.Namespace, comm: Communicator) -> int:
    check_flags(args)
    check_device(args, comm)
    sampling_config(args, SamplingConfig())  # its errors come before the engine is read
    engine = read_alike(Path(args.engine_dir), comm)  # all replicas': their results stand in one file
    replica = join_replica(comm, engine.build.world_size)
    llm = open_llm(args, Ranks(replica.comm))
    with ExitStack() as open_files:
        queue = only_rank_zero(comm, lambda: open_queue(args, llm, replica.count, open_files))
        llm.load()
        logger.info("ready in %.1f s", time.monotonic() - args.started_s)
        if comm.rank == 0:
            with _stopped_in_a_sentence(args.output_jsonl):
                return _lead_all(args.output_jsonl, llm, replica, queue)
        asker = Asker(replica.messages)
        llm.lead(lambda: work(llm, asker.ask, asker.tell))
        if replica.comm.rank == 0:
            asker.tell(END)
    return 0


@contextmanager
def _stopped_in_a_sentence(path: str) -> Iterator[None]:
    """Ctrl-C, and the SIGTERM that mpirun sends when another rank has ended."""
    try:
        with termination_raises():
            yield
    except (KeyboardInterrupt, Terminated):
        raise UnsupportedError(
            f"the run was stopped, or another rank has ended; what was finished is in {path}, and --resume goes on"
        ) from None


def _lead_all(path: str, llm: LLM, replica: Replica, queue: Queue) -> int:
    """Rank 0's part: exit code."""
    others = replica.count - 1
    with Progress("generating", queue.total, "prompt") as progress:
        queue.on_result = lambda: progress.advance(1, f"{queue.tokens_per_s:,.0f} tokens/s")
        with answered(replica.messages, others, queue.answer) if others else nullcontext():
            llm.lead(lambda: work(llm, queue.pull, queue.push))
    queue.put_in_order()
    logger.info(
        "%d prompts, %d new tokens in %.1f s: %.1f tokens/s; the results are in %s",
        queue.total,
        queue.tokens,
        queue.seconds,
        queue.tokens_per_s,
        path,
    )
    if queue.failed:
        logger.error("%d of them failed, each with its error in %s; --resume tries them again", queue.failed, path)
        return USER_ERROR
    return 0


def open_queue(args: argparse.Namespace, llm: LLM, replicas: int, open_files: ExitStack) -> Queue:
    """The work that is left.  Raises ConfigError for a file of prompts or of results that cannot be used."""
    sampling = sampling_config(args, llm.sampling)
    say_unused(args, sampling, [llm.engine])
    system = [{"role": "system", "content": args.system}] if args.system is not None else []

    def as_chat(text: str) -> list[dict[str, str]]:
        return [*system, {"role": "user", "content": text}]

    tasks = read_tasks(llm, Path(args.prompt_file), sampling, args.max_output_len, as_chat if args.chat else None)
    keys = {task.key for task in tasks}
    results = open_files.enter_context(result_file(Path(args.output_jsonl), args.resume, keys))
    queue = Queue(llm, tasks, results, replicas)
    if queue.total < len(tasks):
        logger.info("%d of %d results are in %s already", len(tasks) - queue.total, len(tasks), args.output_jsonl)
    return queue
