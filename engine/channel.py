"""Messages over a private pipe between the two processes: no listening socket, raw buffers kept raw.

A message travels as one header (the dataclass, pickled with protocol 5) and its buffers out of band, so audio
samples are written once and read once. Both ends belong to the same program and nobody else can reach the pipe;
nothing that comes from outside is ever unpickled.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any


def send(connection: Connection, message: object) -> None:
    """Write one message. Raises OSError when the other end is gone."""
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(len(buffers).to_bytes(4, "little") + header)
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """Read one message. Raises EOFError or OSError when the other end is gone."""
    frame = memoryview(connection.recv_bytes())
    buffers = [connection.recv_bytes() for _ in range(int.from_bytes(frame[:4], "little"))]
    return pickle.loads(frame[4:], buffers=buffers)
