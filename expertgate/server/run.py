"""Runs the application and its engine in one process, and ends both without leaving orphans."""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from expertgate.server.app import create_app
from expertgate.server.errors import ApiError
from expertgate.server.failures import ProofError
from expertgate.server.guard import GuardedLLM, UnavailableError
from expertgate.server.handlers import Handlers
from expertgate.server.oversight import Oversight
from expertgate.server.proof import prove
from expertgate.server.service import Service

log = logging.getLogger(__name__)

_DRAIN_S = 30
"""How long streams may go on after the server was told to stop."""
_ENGINE_STOP_S = 10
_MAX_HEADER_BYTES = 1 << 16


def run(
    service: Service,
    oversight: Oversight,
    bound: socket.socket,
    start_engine: Callable[[], GuardedLLM],
    on_ready: Callable[[], None],
) -> None:
    """Serves until SIGTERM or SIGINT. Raises what `start_engine` does, and ProofError.

    HTTP is there before the engine is: `/health` answers at once, `/ready` when it's true.
    """
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # httptools takes headers of any size, and they come before the credential is looked at.
        http="h11",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        # uvicorn hands context variables on to the next request of a connection. Nothing of ours
        # travels in one, and so nothing of anyone else's should.
        reset_contextvars=True,
        # Only uvicorn's own word on who the client is; policies may read it.
        proxy_headers=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(_Server(config), service, oversight, bound, start_engine, on_ready))


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again, and the engine would be orphaned."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _run(
    server: uvicorn.Server,
    service: Service,
    oversight: Oversight,
    bound: socket.socket,
    start_engine: Callable[[], GuardedLLM],
    on_ready: Callable[[], None],
) -> None:
    told = asyncio.Event()

    def stop() -> None:
        server.force_exit = told.is_set()  # told twice: streams are cut off
        told.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, oversight.reload)
    watching = asyncio.create_task(oversight.watch())
    stopping = asyncio.create_task(told.wait())
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    engine: GuardedLLM | None = None
    try:
        starting = _in_thread(start_engine)
        await _first_of(starting, stopping, serving)
        while not starting.done():  # told to stop, so it only has to end
            _end_children()
            await asyncio.wait([starting], timeout=0.5)
        if told.is_set():
            if starting.exception() is None:
                engine = starting.result()
            return
        engine = starting.result()
        proving = asyncio.create_task(_open(service, engine))
        await _first_of(proving, stopping, serving)
        if not proving.done():
            proving.cancel()
            return
        proving.result()
        on_ready()
        await _first_of(stopping, serving)
    finally:
        if engine is not None:
            engine.drain()
        server.should_exit = True
        await serving
        watching.cancel()
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, _ENGINE_STOP_S)
        _end_children()


async def _open(service: Service, engine: GuardedLLM) -> None:
    try:
        record = await service.audit.probe()
        await prove(engine, service.grants, len(service.catalogue), record)
    except ApiError as error:
        raise ProofError(f"the engine was not tried: {error}") from None
    except (UnavailableError, TimeoutError) as error:
        raise ProofError(f"the engine stopped while it was tried: {error}") from None
    service.handlers = Handlers.around(engine)
    service.engine = engine


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """Not the loop's own threads: those are waited for at exit, however long they take."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        try:
            result, error = call(), None
        except BaseException as raised:
            result, error = None, raised
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="engine-start", daemon=True).start()
    return future


async def _first_of(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _end_children() -> None:
    """The engine's processes, where it could not be told to end them."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(_ENGINE_STOP_S)
        if child.is_alive():
            child.kill()
