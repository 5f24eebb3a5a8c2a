"""The process of a rank other than 0: load its part of the decoder, then compute what rank 0 tells, in order.

It decides nothing and answers nothing but that it is ready. A reader thread takes messages off the pipe; when that
closes, rank 0 is gone, and the process ends itself whatever its main thread waits for.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

from torch import Tensor

from engine import channel
from engine.errors import EngineStartError
from engine.input_batch import ForwardStep, LogitRows
from engine.loading import load_rank, start_errors
from engine.messages import EngineArgs, EngineFailed, RankReady, Shutdown
from engine.process import configure, settle_memory
from engine.rank_runner import RankRunner
from model.parallel import Shard, join_group, leave_group

HEARD_FIRST_SECONDS = 1.0
"""A rank also fails because another has: whoever has died or could not start is to be heard before."""

logger = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[ForwardStep | LogitRows | Shutdown]


def main(args: EngineArgs, rank: int, port: int, connection: Connection) -> None:
    """Entry point of the process. port: where rank 0 listens for the others."""
    configure(f"rank {rank}", as_json=args.log_json)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True, name="reader").start()
    try:
        with start_errors():
            runner = _start(args, Shard(rank, args.tensor_parallel_size), port, connection)
        settle_memory()
        channel.send(connection, RankReady())
        _follow(runner, inbox)
    except Exception as error:
        if not isinstance(error, EngineStartError):
            logger.exception("this rank cannot go on")
            error = EngineStartError(f"{type(error).__name__}: {' '.join(str(error).split())}")
            time.sleep(HEARD_FIRST_SECONDS)
        with suppress(OSError):
            channel.send(connection, EngineFailed(str(error)))
        os._exit(1)  # what others of the group wait for must not keep it
    leave_group()
    os._exit(0)  # nothing is left to be tidied up


def _start(args: EngineArgs, shard: Shard, port: int, connection: Connection) -> RankRunner:
    loaded = load_rank(args, shard)
    channel.send(connection, RankReady())
    join_group(shard, port, loaded.model.device, args.rank_timeout_s)
    return RankRunner(loaded.model, loaded.num_kv_blocks(args), loaded.block_size)


def _follow(runner: RankRunner, inbox: Inbox) -> None:
    """Until told to stop. Never waits for a device but where all ranks do."""
    hidden: Tensor | None = None
    while not isinstance(message := inbox.get(), Shutdown):
        if isinstance(message, ForwardStep):
            hidden = runner.forward(message)
        else:
            assert hidden is not None, "rows are of the batch before"
            runner.logits(hidden, message)


def _read(connection: Connection, inbox: Inbox) -> None:
    try:
        while True:
            inbox.put(channel.receive(connection))
    except (EOFError, OSError):
        os._exit(0)
