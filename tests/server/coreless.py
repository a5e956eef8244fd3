"""The whole server and all of vLLM but the engine's own process: what that computes is made up.

So thousands of requests take seconds, and what no engine does on purpose (to fail, to stall, to
die) can be had. Requests come over HTTP, through a real socket.
"""

import asyncio
import contextlib
import json
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import uvicorn
from vllm.renderers import base as renderers
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from expertgate.model.catalogue import Catalogue
from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.cedar import PolicySet
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.admission import Admission
from expertgate.server.app import create_app
from expertgate.server.audit.trail import Trail
from expertgate.server.engine import start
from expertgate.server.handlers import Handlers
from expertgate.server.identity import Identity
from expertgate.server.identity_config import IdentityConfig
from expertgate.server.key_edits import create_key
from expertgate.server.listening import listen
from expertgate.server.policy_files import resources
from expertgate.server.rendering import gather
from expertgate.server.run import Listener, _config
from expertgate.server.service import Service
from tests.server.audit.logs import open_log
from tests.server.running import EXPERTS, GROUPS, POLICIES
from tests.support.checkpoints import random_checkpoint


class Core:
    """In place of the engine's process: writes `a`s, by the first expert of each set."""

    def __init__(self, *_, **__):
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.step_s = 0.0
        self._answering = set()
        self.most_tokens = 4
        """Of a choice, whatever it asks for."""
        self.instead = None
        """Called in place of computing anything: the request then waits for ever."""
        self.work = defaultdict(lambda: [0, 0])
        self._outputs: asyncio.Queue | None = None

    @property
    def outputs(self) -> asyncio.Queue:
        """Made on the loop that it is used on."""
        if self._outputs is None:
            self._outputs = asyncio.Queue()
        return self._outputs

    async def get_supported_tasks_async(self):
        return ("generate",)

    async def get_output_async(self):
        return await self.outputs.get()

    async def abort_requests_async(self, _):
        pass

    def shutdown(self, timeout=None):
        pass

    async def add_request_async(self, request):
        params, prompt = request.sampling_params, request.prompt_token_ids
        tokens = min(self.most_tokens, params.max_tokens)
        account = params.extra_args[ACCOUNT_ARG]
        self.work[account][0] = params.extra_args[EXTRA_ARG]
        self.work[account][1] += len(prompt) + tokens - 1
        if self.instead is not None:
            self.instead()
            return
        answering = asyncio.create_task(self._answer(request, tokens))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    async def _answer(self, request, tokens):
        params, prompt = request.sampling_params, request.prompt_token_ids
        for place in range(tokens):
            last = place == tokens - 1
            made = EngineCoreOutput(
                request.request_id,
                [65],
                new_logprobs=_logprobs(params.logprobs),
                finish_reason=FinishReason.LENGTH if last else None,
            )
            if place == 0 and params.prompt_logprobs is not None:
                made.new_prompt_logprobs_tensors = _of_prompt(params.prompt_logprobs, prompt)
            self.outputs.put_nowait(EngineCoreOutputs(outputs=[made]))
            await asyncio.sleep(self.step_s)

    async def collective_rpc_async(self, method, timeout=None, args=(), kwargs=None):
        assert method == "expertgate_usage"
        return [[self._usage(account) for account in args[0]]]

    def _usage(self, account):
        mask, computed = self.work.pop(account)
        slots = [0] * len(EXPERTS)
        slots[min(ExpertSet(mask))] = computed
        return 1, computed, 0, slots, [slot << 32 for slot in slots]


def _logprobs(count):
    if count is None:
        return None
    ids = np.arange(65, 66 + count)[None, :]
    return LogprobsLists(ids, np.full(ids.shape, -1.0), np.array([1]))


def _of_prompt(count, prompt):
    count = 319 if count == -1 else count
    rows = len(prompt) - 1
    ids = torch.arange(count + 1).expand(rows, -1).contiguous()
    return LogprobsTensors(ids, torch.full(ids.shape, -1.0), torch.ones(rows, dtype=torch.int64))


class Coreless:
    """A server on a socket of its own, until `close`."""

    def __init__(self, folder: Path, max_num_seqs: int | None = None, **identity) -> None:
        checkpoint = random_checkpoint(folder / "toy", num_experts=len(EXPERTS), top_k=2)
        (folder / "experts.json").write_text(json.dumps({"version": 1, "experts": EXPERTS}))
        (folder / "policies").mkdir()
        (folder / "policies" / "all.cedar").write_text(POLICIES)
        known = Catalogue.read(folder / "experts.json")
        self.keys = {
            user: create_key(folder / "keys.yaml", user, groups, None)
            for user, groups in GROUPS.items()
        }
        claims = {"department": "string"}
        self.service = Service(
            known,
            Identity(IdentityConfig(api_keys=folder / "keys.yaml", **identity)),
            PolicySet.load(folder / "policies", resources(known), claims),
            Trail(open_log(folder), known),
            Admission(),
        )
        arguments = {"max_model_len": 2048, "enforce_eager": True, "disable_log_stats": True}
        arguments["kv_cache_memory_bytes"] = 1 << 26  # which nobody takes
        if max_num_seqs is not None:
            arguments["max_num_seqs"] = max_num_seqs
        with mock.patch.object(EngineCoreClient, "make_async_mp_client", Core):
            engine = start(checkpoint, "toy", arguments, self.service.grants)
        self.llm = engine._engine
        """Of vLLM, around which the guard is."""
        self.core = self.llm.engine_core
        self.service.handlers = Handlers.around(engine, None)
        assert renderers.asyncio.gather is gather, "handlers render in place"
        self.service.engine = self.engine = engine
        self.bound = bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._server = uvicorn.Server(_config(Listener(create_app(self.service), bound, None), 1))
        started = threading.Event()

        async def serve() -> None:
            serving = asyncio.create_task(self._server.serve(sockets=[bound]))
            while not self._server.started:
                await asyncio.sleep(0.01)
            started.set()
            await serving

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        started.wait()

    @property
    def running(self) -> int:
        """Calls of the engine that have begun, and whose outputs are not all read."""
        return sum(call.report is None for grant in self.service.grants for call in grant.calls)

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return sum(grant.calls_expected - len(grant.calls) for grant in self.service.grants)

    def headers(self, user: str = "alice", **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[user]}", **more}

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        with contextlib.suppress(RuntimeError):
            self.engine.shutdown(1)
        self.service.audit.stop()
