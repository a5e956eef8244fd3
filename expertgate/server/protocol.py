"""HTTP/1.1 with an end to patience: uvicorn waits for ever for headers, and for readers.

A connection that asks nothing in time is closed, and so is one whose client stops reading while
more than the socket's buffers hold is waiting for it.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from expertgate.server.certificates import STATE

HEADERS_S = 15.0
"""From a connection, or the first byte of a request on it, to the end of that request's headers."""
READING_S = 30.0
"""In which a client has to take what fills the buffers, some 50 KiB."""


class PatientProtocol(H11Protocol):
    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn tells the application nothing of TLS, but copies this into each request's state.
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.app_state = {**self.app_state, STATE: certificate}
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers()
        else:
            self._have_headers()

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
