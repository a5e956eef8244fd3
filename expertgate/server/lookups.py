"""Names of hosts are looked up beside the event loop, however long a resolver takes.

The loop would use its own threads, which are few, and would not close before they have ended: the
process would outlive its time, and its audit log be left unsigned.
"""

import asyncio
import socket
from functools import partial
from typing import Any

from expertgate.server.beside import beside


def look_up_beside(loop: asyncio.AbstractEventLoop) -> None:
    """Gives `loop` a getaddrinfo for which nobody waits at the end of the process."""
    under_way: dict[tuple[Any, ...], asyncio.Future[Any]] = {}

    async def getaddrinfo(host: Any, port: Any, **how: int) -> Any:
        asked = host, port, *sorted(how.items())
        if asked not in under_way:
            # One for all who ask for the same, or a resolver that hangs would be given ever more.
            look = partial(socket.getaddrinfo, host, port, **how)
            found = under_way[asked] = beside(look, "names")
            found.add_done_callback(partial(ended, asked))
        return await asyncio.shield(under_way[asked])

    def ended(asked: tuple[Any, ...], found: asyncio.Future[Any]) -> None:
        del under_way[asked]
        found.exception()  # whoever asked may have left

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
