"""Server-sent events, split where their standard splits them.

httpx's `iter_lines` and `str.splitlines` also split at characters that a token may bring unescaped
into JSON, as U+2028 and U+0085.
"""

from collections.abc import Iterator

import httpx


def data(response: httpx.Response) -> Iterator[str]:
    """What comes behind each `data: `, as it comes; the last is `[DONE]` where the answer is whole.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode()
