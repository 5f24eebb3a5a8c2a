"""Sockets to serve on, opened before anything is loaded: an address that cannot be had is told at once."""

from __future__ import annotations

import errno
import socket

_REMEDIES = {
    errno.EADDRINUSE: "the port is taken: end what listens there, or choose another by {flag}",
    errno.EACCES: "only root may have that port: choose another, from 1024 up, by {flag}",
    errno.EADDRNOTAVAIL: "this machine does not have that address: give one of its own, or 0.0.0.0 for all of them",
}


class ListenError(Exception):
    """The address cannot be listened on; the message says what to do."""


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Bind, and no more. flag: what sets the port. Raises ListenError.

    The protocol is named: else asyncio leaves Nagle's algorithm on for what is accepted.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = _REMEDIES.get(error.errno or 0, error.strerror or str(error)).format(flag=flag)
        raise ListenError(f"cannot listen on {host}:{port}: {reason}") from None
    listener.set_inheritable(True)
    return listener
