"""Stands in for `engine.worker`: ranks that do not come up. What goes wrong is told by the checkpoint's name."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

from engine import channel
from engine.messages import EngineArgs, EngineFailed, RankReady


def main(args: EngineArgs, rank: int, port: int, connection: Connection) -> None:
    """Rank 1 is fine as far as it goes; rank 2 fails."""
    channel.send(connection, RankReady())
    if rank == 1:
        connection.recv()
    elif Path(args.model_folder).name == "speaks":
        channel.send(connection, EngineFailed("its memory is full"))
    else:
        os._exit(3)
