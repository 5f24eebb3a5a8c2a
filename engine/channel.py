"""Messages over a private pipe between the two processes: no listening socket, raw buffers kept raw.

    number of buffers, length of the pickle | lengths of the buffers | the dataclass, pickled | the buffers

Audio samples lie outside the pickle: the kernel reads them where they are and writes them where they stay, once on
either side. What arrives is read-only. Both calls block without the GIL and belong into threads. Both ends belong to
the same program and nobody else can reach the pipe; nothing that comes from outside is ever unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from engine.messages import EngineOutput, EngineStats, TokenLogprobs

MAX_VECTORS = 512
"""Buffers of one call: systems take 1,024."""

_PREFIX = struct.Struct("<QQ")


def send(connection: Connection, message: object) -> None:
    """Write one message. Raises OSError when the other end is gone."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(message)
    header, raw = pickled.getbuffer(), [buffer.raw() for buffer in buffers]
    lengths = struct.pack(f"<{len(raw)}Q", *(part.nbytes for part in raw))
    prefix = _PREFIX.pack(len(raw), len(header))
    _transfer(os.writev, connection, [memoryview(prefix + lengths), header, *raw])


def receive(connection: Connection) -> Any:
    """Read one message. Raises EOFError or OSError when the other end is gone."""
    [prefix] = _read(connection, _PREFIX.size)
    num_buffers, header_length = _PREFIX.unpack(prefix)
    lengths, header = _read(connection, 8 * num_buffers, header_length)
    buffers = _read(connection, *struct.unpack(f"<{num_buffers}Q", lengths))
    return pickle.loads(header, buffers=[buffer.toreadonly() for buffer in buffers])


def _read(connection: Connection, *lengths: int) -> list[memoryview]:
    parts = [memoryview(bytearray(length)) for length in lengths]
    _transfer(os.readv, connection, parts)
    return parts


def _transfer(call: Callable[[int, list[memoryview]], int], connection: Connection, parts: list[memoryview]) -> None:
    """Read or write all of `parts`, in as many calls as it takes."""
    left = [part for part in parts if part.nbytes]
    while left:
        num_bytes = call(connection.fileno(), left[:MAX_VECTORS])
        if not num_bytes:
            raise EOFError
        while left and num_bytes >= left[0].nbytes:
            num_bytes -= left.pop(0).nbytes
        if num_bytes:
            left[0] = left[0][num_bytes:]


def _by_fields(kind: type[Any]) -> Callable[[Any], tuple[type[Any], tuple[Any, ...]]]:
    values = attrgetter(*(field.name for field in fields(kind)))
    return lambda message: (kind, values(message))


class _Pickler(pickle.Pickler):
    """Calls the constructor of what comes by the dozen: a frozen dataclass's own way takes thrice the time."""

    dispatch_table = {kind: _by_fields(kind) for kind in (EngineOutput, EngineStats, TokenLogprobs)}  # noqa: RUF012
