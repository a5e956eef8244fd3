"""What the process does while it serves, with an engine that does nothing."""

import asyncio
import logging
import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

from expertgate.model.catalogue import Catalogue
from expertgate.server import run, serving
from expertgate.server.config import Config
from expertgate.server.key_edits import create_key
from expertgate.server.refusals import SettingError
from expertgate.server.service import Service
from tests.server.running import prepare


class Server:
    """Serves nobody until it is told to stop, or what runs until it is cut off."""

    def __init__(self):
        self.should_exit = self.force_exit = self.runs = False

    async def listen(self):
        while not self.should_exit or (self.runs and not self.force_exit):
            await asyncio.sleep(0.01)


class Watch:
    def __init__(self):
        self.fault = asyncio.get_running_loop().create_future()
        self.reload = lambda: None

    async def watch(self):
        raise await self.fault


class Engine:
    def __init__(self, server):
        self._server = server

    def drain(self): ...

    async def cut(self):
        self._server.runs = False

    def shutdown(self, timeout_s): ...


@pytest.fixture
def serve(monkeypatch):
    """Runs a scenario, given the service and its two watches, in a server that has begun."""

    async def serve(scenario, drain_s):
        server, service = Server(), Service(None, None, None, SimpleNamespace(ready=True))
        oversight, liveness, ready = Watch(), Watch(), asyncio.Event()
        liveness.late = False
        engine = Engine(server)
        engine.errored = False

        async def open_(*_):
            service.engine, service.handlers = engine, object()
            service.liveness = liveness

        monkeypatch.setattr(run, "_open", open_)
        running = asyncio.create_task(
            run._run(
                [server], service, oversight, lambda: engine, lambda _: None, ready.set, drain_s
            )
        )
        await asyncio.wait_for(ready.wait(), 20)
        await scenario(service, oversight, liveness, server=server)
        server.should_exit = True
        await asyncio.wait_for(running, 20)
        return service

    return lambda scenario, drain_s=1: asyncio.run(serve(scenario, drain_s))


@pytest.mark.parametrize(
    ("which", "what"), [(0, "what permissions rest on"), (1, "whether the engine answers")]
)
@pytest.mark.parametrize("fault", [ZeroDivisionError, asyncio.CancelledError])
def test_a_watch_that_ends_is_told_and_leaves_the_server_unready(serve, caplog, which, what, fault):
    async def scenario(service, *watches, server):
        assert service.unready is None
        watches[which].fault.set_result(fault())
        for _ in range(3):
            await asyncio.sleep(0)
        assert service.unready == f"{what} is no longer watched"

    serve(scenario)
    (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    assert record.getMessage() == f"{what} is no longer watched"
    assert ("ZeroDivisionError" in caplog.text) == (fault is ZeroDivisionError)


def test_the_signal_to_read_again_ends_no_server_that_starts(monkeypatch):
    def read(*_):
        os.kill(os.getpid(), signal.SIGHUP)
        raise SettingError("this far")

    def ends(*_):
        raise AssertionError("it ends here")

    monkeypatch.setattr(serving, "_read", read)
    before = signal.signal(signal.SIGHUP, ends)
    try:
        with pytest.raises(SettingError, match="this far"):
            serving.serve_config(None, model=None, host=None, port=None, flags=())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_watches_that_end_with_the_server_are_no_fault(serve, caplog):
    async def scenario(*_, server):
        pass

    assert serve(scenario).unready is None
    assert not [r for r in caplog.records if r.levelno == logging.CRITICAL]


def test_the_log_says_that_it_was_told_to_stop(serve, caplog):
    caplog.set_level(logging.INFO, "expertgate")

    async def scenario(*_, server):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)

    serve(scenario)
    assert [r.getMessage() for r in caplog.records if r.name == run.__name__] == [
        "stopping: nothing new is taken, and what runs may take 1 s",
        "told again to stop: what runs is cut off",
    ]


def test_told_again_to_stop_the_engine_ends_what_runs_with_an_error(serve):
    """Cut off by the server alone, it would have no answer, and no result on record."""

    async def scenario(*_, server):
        server.runs = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        async with asyncio.timeout(20):
            while server.runs:
                await asyncio.sleep(0.01)

    serve(scenario, drain_s=600)


@pytest.mark.parametrize("times", [2, 3])
def test_told_again_to_stop_nobody_who_does_not_end_is_waited_for(serve, monkeypatch, times):
    monkeypatch.setattr(Engine, "cut", lambda _: asyncio.sleep(0))
    monkeypatch.setattr(run, "_CUT_S", 600 if times == 3 else 0.1)

    async def scenario(*_, server):
        server.runs = True
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)

    serve(scenario, drain_s=600)


def test_a_catalogue_that_changes_while_weights_are_hashed_is_read_again(tmp_path, monkeypatch):
    """Which takes minutes; whose an expert is would else stay as it was, until the next change."""
    prepare(tmp_path)
    create_key(tmp_path / "keys.yaml", "alice", [], None)
    for module, name in (("environment", "settle"), ("environment", "allow_files")):
        monkeypatch.setattr(getattr(serving, module), name, lambda: None)
    monkeypatch.setattr(serving.logs, "set_up", lambda _: None)
    experts = tmp_path / "toy" / "experts.json"
    check = Catalogue.check_against

    def slow(known, checkpoint):
        check(known, checkpoint)
        experts.write_text(experts.read_text().replace("acme", "heirs"))

    monkeypatch.setattr(Catalogue, "check_against", slow)
    parts = serving._read(Config.load(tmp_path / "expertgate.yaml"), None)
    assert parts.known.experts[1].owner == "acme"
    assert parts.files.stamp() != parts.seen


def test_a_server_ends_though_the_lookup_of_a_name_does_not(serve, monkeypatch):
    go_on, told = threading.Event(), []

    def hang(*_, **__):
        go_on.wait(60)
        told.append(True)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def scenario(*_, server):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.get_running_loop().getaddrinfo("issuer.invalid", 443)

    serve(scenario)
    assert not told
    go_on.set()
