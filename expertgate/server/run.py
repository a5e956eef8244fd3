"""Runs the application and its engine in one process, and ends both without leaving orphans."""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import uvicorn
from fastapi import FastAPI
from vllm.envs import enable_envs_cache
from vllm.utils.gc_utils import freeze_gc_heap

from expertgate.server.audit.writer import Recorded
from expertgate.server.beside import beside
from expertgate.server.config import KEEP_ALIVE_S, TlsConfig
from expertgate.server.errors import ApiError
from expertgate.server.failures import ProofError
from expertgate.server.guard import GuardedLLM, UnavailableError
from expertgate.server.handlers import Handlers
from expertgate.server.liveness import Liveness
from expertgate.server.lookups import look_up_beside
from expertgate.server.metrics import count_work
from expertgate.server.oversight import Oversight
from expertgate.server.proof import prove, prove_namespaces
from expertgate.server.protocol import PatientProtocol
from expertgate.server.service import Service

log = logging.getLogger(__name__)

_CUT_S = 5
"""In which what was cut off must have told its clients so."""
_ENGINE_STOP_S = 10
_PROOF_S = 600
"""For a dozen tokens, of the first of which an engine may have to compile something."""


@dataclass(frozen=True, slots=True)
class Listener:
    app: FastAPI
    bound: socket.socket
    tls: TlsConfig | None = None
    keep_alive_s: int = KEEP_ALIVE_S


def run(
    service: Service,
    oversight: Oversight,
    listeners: Sequence[Listener],
    start_engine: Callable[[], GuardedLLM],
    make_handlers: Callable[[GuardedLLM], Handlers],
    on_ready: Callable[[], None],
    drain_s: int,
) -> None:
    """Serves until SIGTERM or SIGINT. Raises what the two calls do, and ProofError.

    HTTP is there before the engine is: `/health` answers at once, `/ready` when it's true. Told to
    stop, it takes nothing new, and cuts off after `drain_s` what has not ended by then.
    """
    servers = [_Server(listener, drain_s) for listener in listeners]
    with asyncio.Runner(loop_factory=servers[0].config.get_loop_factory()) as runner:
        runner.run(
            _run(servers, service, oversight, start_engine, make_handlers, on_ready, drain_s)
        )


def _config(listener: Listener, drain_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        listener.app,
        **_tls(listener.tls),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        http=PatientProtocol,
        # None are served. Asked for one behind another request, uvicorn would give the connection
        # to a protocol that tells that request nothing of its client any more.
        ws="none",
        # uvicorn hands context variables on to the next request of a connection. Nothing of ours
        # travels in one, and so nothing of anyone else's should.
        reset_contextvars=True,
        # Only uvicorn's own word on who the client is; policies may read it.
        proxy_headers=False,
        timeout_keep_alive=listener.keep_alive_s,
        timeout_graceful_shutdown=drain_s + _CUT_S,
    )


def _tls(config: TlsConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    found: dict[str, Any] = {"ssl_certfile": config.certificate, "ssl_keyfile": config.key}
    if config.client_ca is not None:
        found |= {"ssl_ca_certs": str(config.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return found


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again, and the engine would be orphaned."""

    def __init__(self, listener: Listener, drain_s: int) -> None:
        super().__init__(_config(listener, drain_s))
        self._bound = listener.bound

    async def listen(self) -> None:
        await self.serve(sockets=[self._bound])

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Stop:
    """What signals ask for: to stop, then to cut off what runs, then to wait for nobody."""

    def __init__(self, servers: Sequence[_Server], drain_s: int) -> None:
        self._servers = servers
        self._drain_s = drain_s
        self.requested, self.cut_requested = asyncio.Event(), asyncio.Event()

    def ask(self) -> None:
        if not self.requested.is_set():
            log.info("stopping: nothing new is taken, and what runs may take %d s", self._drain_s)
            self.requested.set()
            return
        log.warning("told again to stop: what runs is cut off")
        for server in self._servers:
            server.force_exit = self.cut_requested.is_set()
        self.cut_requested.set()


async def _run(
    servers: Sequence[_Server],
    service: Service,
    oversight: Oversight,
    start_engine: Callable[[], GuardedLLM],
    make_handlers: Callable[[GuardedLLM], Handlers],
    on_ready: Callable[[], None],
    drain_s: int,
) -> None:
    stop = _Stop(servers, drain_s)
    loop = asyncio.get_running_loop()
    look_up_beside(loop)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.ask)
    loop.add_signal_handler(signal.SIGHUP, oversight.reload)
    watching = [_watched(oversight.watch(), "what permissions rest on", service)]
    stopping = asyncio.create_task(stop.requested.wait())
    serving = asyncio.gather(*(server.listen() for server in servers))
    engine: GuardedLLM | None = None
    try:
        starting = beside(lambda: _deaf_to_ctrl_c(start_engine), "engine-start")
        await _first_of(starting, stopping, serving)
        while not starting.done():  # asked to stop, so it only has to end
            _end_children()
            await asyncio.wait([starting], timeout=0.5)
        if stop.requested.is_set():
            if starting.exception() is None:
                engine = starting.result()
            return
        engine = starting.result()
        proving = asyncio.create_task(_open(service, engine, make_handlers))
        await _first_of(proving, stopping, serving)
        if not proving.done():
            proving.cancel()
            return
        proving.result()
        if service.liveness is not None:
            what = "whether the engine answers"
            watching.append(_watched(service.liveness.watch(), what, service))
            on_ready()
        await _first_of(stopping, serving)
    finally:
        if engine is not None:
            engine.drain()
        await _end_serving(servers, serving, engine, stop.cut_requested, drain_s)
        for watch in watching:
            watch.cancel()
        if engine is not None:
            await beside(partial(engine.shutdown, _ENGINE_STOP_S), "engine-stop")
        _end_children()
        gc.unfreeze()  # or libraries report as leaked what the end would have collected


async def _end_serving(
    servers: Sequence[_Server],
    serving: asyncio.Future[Any],
    engine: GuardedLLM | None,
    cut_requested: asyncio.Event,
    drain_s: int,
) -> None:
    """Takes nothing new, and cuts off what is left after `drain_s`. Raises what serving did."""
    for server in servers:
        server.should_exit = True
    cutting = asyncio.create_task(cut_requested.wait())
    await _first_of(serving, cutting, timeout_s=drain_s)
    if not serving.done() and engine is not None:
        if not cut_requested.is_set():
            log.warning("what has not ended by now is cut off")
        await engine.cut()
    if cutting.done():  # else uvicorn has its own end to patience
        await asyncio.wait([serving], timeout=_CUT_S)
        for server in servers:
            server.force_exit = True
    cutting.cancel()
    await serving


def _watched(watch: Coroutine[Any, Any, None], what: str, service: Service) -> asyncio.Task[None]:
    """Runs a watch that should not end before it is cancelled, and tells where it did."""
    task = asyncio.create_task(watch)

    def ended(_: object) -> None:
        if task.cancelling():
            return
        service.unwatched = what
        error = None if task.cancelled() else task.exception()
        log.critical("%s is no longer watched", what, exc_info=error)

    task.add_done_callback(ended)
    return task


async def _open(
    service: Service, engine: GuardedLLM, make_handlers: Callable[[GuardedLLM], Handlers]
) -> None:
    try:
        recorded = await service.audit.probe()
        async with asyncio.timeout(_PROOF_S):
            await prove(engine, service.grants, len(service.catalogue), recorded)
            service.fault = await _fault(engine, service, recorded)
    except ApiError as error:
        raise ProofError(f"the engine was not tried: {error}") from None
    except UnavailableError as error:
        raise ProofError(f"the engine stopped while it was tried: {error}") from None
    except TimeoutError:
        raise ProofError(f"the engine didn't prove itself within {_PROOF_S} s") from None
    if service.fault is not None:
        log.error("not ready, and will not be: %s", service.fault)
        return
    service.admission.places = engine.places
    names = service.catalogue.names(service.catalogue.all)
    engine.on_work = partial(count_work, names)
    service.handlers = make_handlers(engine)
    service.liveness = Liveness(engine, service.grants, recorded)
    # What has been made by now stays. The collector would look through it again and again while
    # requests wait, which took more time than they did; and vLLM reads the environment anew for
    # each token, as its other processes don't.
    freeze_gc_heap()
    enable_envs_cache()
    service.engine = engine


async def _fault(engine: GuardedLLM, service: Service, recorded: Recorded) -> str | None:
    try:
        await prove_namespaces(engine, service.grants, len(service.catalogue), recorded)
    except ProofError as error:
        return f"the engine failed its self-test: {error}"
    return None


def _deaf_to_ctrl_c(start_engine: Callable[[], GuardedLLM]) -> GuardedLLM:
    """Starts processes that never see SIGINT; for a thread that does nothing else.

    A terminal sends it to all processes of the group. The engine's would end by it, and with them
    what may still take `drain_s`; they have the signal mask of the thread that starts them.
    """
    resource_tracker.ensure_running()  # where it has to start it, Python 3.11 lifts the mask again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return start_engine()


async def _first_of(*tasks: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def _end_children() -> None:
    """The engine's processes, where it could not be told to end them."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(_ENGINE_STOP_S)
        if child.is_alive():
            child.kill()
