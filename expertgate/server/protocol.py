"""HTTP/1.1 with an end to patience: uvicorn waits for ever for headers, and for readers.

A connection that asks nothing in time is closed, and so is one whose client stops reading while
more than the socket's buffers hold is waiting for it. Headers have a size, too: they come before
the credential is looked at.
"""

import asyncio
import sys
from typing import Any

from httptools import HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from expertgate.server.certificates import STATE

HEADERS_S = 15.0
"""From a connection, or the first byte of a request on it, to the end of that request's headers."""
READING_S = 30.0
"""In which a client has to take what fills the buffers, some 50 KiB."""
MAX_HEAD_BYTES = 1 << 16
"""Of a request's target and headers."""
MAX_BEHIND = 64
"""Requests of a connection that wait for those before them. uvicorn keeps any number, and reads on
with each answer: what anybody sends behind `/health` would fill memory, and hold up the loop."""


class _TooLarge(Exception):  # noqa: N818  (what it is)
    """Raised out of the parser, which makes a 400 of it and closes the connection."""


class _TooMany(Exception):  # noqa: N818  (what it is)
    """Raised out of the parser, so that it reads none of the others."""


class PatientProtocol(HttpToolsProtocol):
    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0
    """Parsed so far of the head that is being read."""
    _answering: RequestResponseCycle | None = None
    """The request that runs; uvicorn's own `cycle` is the last that came, maybe behind it."""
    _unparsed_bytes = 0
    """Received in a row without the end of a head, or anything of a body: the parser gives a header
    when it is whole, and gathers it until then. A trailer is one to it as well."""
    _data = b""
    """What the parser is given now."""
    _repeated = False
    """The head that is parsed is one that was parsed before."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn tells the application nothing of TLS, but copies this into each request's state.
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.app_state = {**self.app_state, STATE: certificate}
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        self._parse(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers()
        else:
            self._have_headers()
        # Where it is closing, there is an answer on its way that says why.
        if self._unparsed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()

    def _parse(self, data: bytes) -> None:
        self._data = data
        super().data_received(data)
        self._data = b""

    def on_message_begin(self) -> None:
        if self._repeated:
            return
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._repeated:
            return
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Behind a chunked body come trailers; to uvicorn they are headers like others.
        if self._in_head:
            self._count(name + value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._repeated:
            self._repeated = False
            return
        self._in_head, self._unparsed_bytes = False, 0
        if len(self.pipeline) >= MAX_BEHIND:
            self.transport.abort()  # a 400 would stand in the middle of the answer that runs
            raise _TooMany
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        if not self.parser.should_upgrade():  # else its body comes now
            super().on_message_complete()

    def _count(self, part: bytes) -> None:
        self._head_bytes += len(part)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _TooLarge

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._have_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        self._have_read()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        """Reads such a request as others are read (RFC 9110, §7.8), and logs nothing of it.

        To the parser, what follows its head is the other protocol's, and then another request. So
        it is given a head that says as much of the body, and asks for nothing.
        """
        asked = sys.exception()
        assert isinstance(asked, HttpParserUpgrade)
        names = (b"content-length", b"transfer-encoding")
        framing = [b"%b: %b\r\n" % each for each in self.headers if each[0] in names]
        rest = self._data[asked.args[0] :]
        self._repeated = True
        self._parse(b"".join([b"POST / HTTP/1.1\r\n", *framing, b"\r\n", rest]))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _wait_for_headers(self) -> None:
        if self._asking is None:
            self._asking = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _have_headers(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _have_read(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
