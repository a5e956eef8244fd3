"""Takes the server's address before anything slow begins, so that a taken port shows at once."""

import errno
import os
import socket
import stat
from pathlib import Path


class ListenError(OSError):
    """The address can't be had; one line that says why."""


def listen(host: str, port: int) -> socket.socket:
    """Raises ListenError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            # Two may be bound to an address, until one listens. uvloop, the second to try, would
            # serve nobody and say nothing of it.
            bound.listen()
        except OSError:
            bound.close()
            raise
    except OSError as error:
        why = error.strerror or error
        hint = "; stop what listens there, or choose another --port" if _in_use(error) else ""
        raise ListenError(f"can't listen on {host}:{port}: {why}{hint}") from None
    return bound


def _in_use(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def listen_at(place: str) -> socket.socket:
    """`HOST:PORT` or `unix:PATH`, a socket for this user alone. Raises ListenError."""
    kind, _, rest = place.partition(":")
    if kind == "unix":
        return _listen_unix(Path(rest))
    host, _, port = place.rpartition(":")
    return listen(host.strip("[]"), int(port))


def _listen_unix(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX)
    try:
        if _is_left_over(path):
            path.unlink()
        before = os.umask(0o177)
        try:
            bound.bind(str(path))
            bound.listen()
        finally:
            os.umask(before)
    except OSError as error:
        bound.close()
        raise ListenError(f"can't listen on unix:{path}: {error.strerror or error}") from None
    return bound


def _is_left_over(path: Path) -> bool:
    """A socket at which nobody listens, such as a server leaves that was killed."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as trying:
            trying.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
