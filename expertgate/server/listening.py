"""Takes the server's address before anything slow begins, so that a taken port shows at once."""

import socket


class ListenError(OSError):
    """The address can't be had; one line that says why."""


def listen(host: str, port: int) -> socket.socket:
    """Raises ListenError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ListenError(f"can't listen on {host}:{port}: {error.strerror or error}") from None
    return bound
