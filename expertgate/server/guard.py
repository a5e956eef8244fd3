"""The one way to the engine: an engine call runs on an open grant, or not at all.

`GuardedLLM` holds vLLM's `AsyncLLM` and shows vLLM's serving handlers only what they need of it.
It doesn't inherit: a method that isn't written here (`encode`, `add_request`, `collective_rpc`,
weight updates, whatever a later vLLM brings) does not exist for them.
"""

import asyncio
import copy
import logging
import math
import sys
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG
from expertgate.model.usage import Usage, Work
from expertgate.policies.expert_set import ExpertSet
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.grants import HANDLE_ARG, Call, Grant, GrantError, Grants
from expertgate.server.logprobs import count_logprobs
from expertgate.server.progress import Progress
from expertgate.server.reports import Reports
from expertgate.server.turns import Turns

log = logging.getLogger(__name__)

_LOOK_AFTER_S = 1  # how often the engine is looked after while its answer is waited for
_LAST_WORDS_S = 2.0
"""In which an engine that is cut off has to say what it counted: their clients must be told too."""


class UnavailableError(GenerationError):
    """The engine is dead, starting or going down.

    A GenerationError, because vLLM's streams turn those into an error event of this status.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


class GuardedLLM:
    """What vLLM's handlers see as their engine client."""

    def __init__(
        self, engine: AsyncLLM, grants: Grants, salts: CacheSalts, turns: Turns | None = None
    ) -> None:
        """Without `turns`, calls run as they come."""
        self._engine = engine
        self._grants = grants
        self._salts = salts
        self._reports = Reports(self._ask_workers)
        self._turns = Turns(sys.maxsize) if turns is None else turns
        self._draining = False
        self.cutting = asyncio.Event()
        """Set where what still runs is to end now."""
        self._unheard_from = math.inf
        """From when on, in the event loop's time, the engine's answers are waited for no more."""
        self._running: set[str] = set()
        self.on_work: Callable[[Work], None] = lambda _: None
        """Told what each engine call was computed with."""
        self.heard = 0
        """Counts what the engine says, so that its silence shows."""
        # Read by the handlers when they are made.
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor

    @property
    def errored(self) -> bool:
        return self._draining or bool(self._engine.errored)

    @property
    def dead(self) -> bool:
        """The engine's processes are gone, and not because they were told to go."""
        return not self._draining and bool(self._engine.errored)

    @property
    def dead_error(self) -> UnavailableError:
        if self._draining:
            return UnavailableError("the server is going down")
        return UnavailableError("the engine has stopped")

    @property
    def busy(self) -> bool:
        """Calls run in the engine, or are on their way there."""
        return bool(self._running)

    @property
    def places(self) -> int:
        """Choices that the engine takes, running and waiting."""
        return int(self.vllm_config.scheduler_config.max_num_queued_reqs)

    def tenant_of(self, handle: object) -> str:
        """Whom the open grant of this handle is for. Raises GrantError."""
        return self._grants.redeem(handle).tenant

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raises vLLM's QueueOverflowError where the engine's queue is full."""
        self._engine.check_admission(n, request_id)

    async def is_tracing_enabled(self) -> bool:
        return False

    # Not `async def`: the grant is redeemed when a handler calls, not when it first awaits.
    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **_chosen_by_client: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs a rendered prompt with the experts of the grant in `sampling_params`.

        The id, priority, session, rank and trace headers given here come from bodies and headers;
        the engine gets our own id and the defaults of the others.

        Raises GrantError where there is no open grant, or for a prompt that is not a rendered
        one; WithdrawnError; UnavailableError where the engine can't run it; VLLMValidationError
        where more log probabilities are asked for than can be told.
        """
        del request_id
        grant = self._redeemed(prompt, sampling_params, lora_request)
        tokens = len(prompt["prompt_token_ids"])
        count_logprobs(grant, sampling_params, tokens, self.model_config)
        params = copy.copy(sampling_params)
        granted: dict[str, Any] = {
            "type": "token",
            "prompt_token_ids": prompt["prompt_token_ids"],
            "cache_salt": self._salts.salt(grant.experts, grant.tenant, prompt.get("cache_salt")),
        }
        if "prompt" in prompt:
            granted["prompt"] = prompt["prompt"]

        call = grant.expect_call(granted["prompt_token_ids"], params.n)

        def start() -> AsyncGenerator[RequestOutput, None]:
            # A new dictionary: the one that is there is what the caller wrote.
            params.extra_args = {EXTRA_ARG: grant.experts.mask, ACCOUNT_ARG: call.id}
            generator: AsyncGenerator[RequestOutput, None] = self._engine.generate(
                granted,
                params,
                call.id,
                prompt_text=prompt_text,
                reasoning_ended=reasoning_ended,
                reasoning_parser_kwargs=reasoning_parser_kwargs,
            )
            return generator

        progress = Progress(self._engine)
        running = self._run(
            grant,
            call,
            start,
            progress,
            constrained=params.structured_outputs is not None,
            piecemeal=params.output_kind is RequestOutputKind.DELTA,
        )
        return self._in_turn(grant, call, running, progress)

    def _redeemed(self, prompt: Any, params: Any, lora_request: Any) -> Grant:
        """The open grant in `params`, for what can be granted. Raises as `generate` does."""
        if not isinstance(params, SamplingParams):
            raise GrantError("only sampling can be granted")
        grant = self._grants.redeem((params.extra_args or {}).get(HANDLE_ARG))
        grant.check()
        if lora_request is not None:
            raise GrantError("an adapter can't be granted")
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise GrantError("only prompts of rendered tokens can be granted")
        if self.errored:
            raise self.dead_error
        return grant

    async def _in_turn(
        self,
        grant: Grant,
        call: Call,
        running: AsyncGenerator[RequestOutput, None],
        progress: Progress,
    ) -> AsyncGenerator[RequestOutput, None]:
        turn = self._turns.turn(grant.tenant, call.choices, call.prompt_tokens, progress)
        async with turn, aclosing(running):
            grant.spend(call.prompt_tokens)
            async for output in running:
                progress.heard = True
                tokens = sum(len(choice.token_ids) for choice in output.outputs)
                self._turns.spend(grant.tenant, tokens)
                grant.spend(tokens)
                yield output

    async def _run(
        self,
        grant: Grant,
        call: Call,
        start: Callable[[], AsyncGenerator[RequestOutput, None]],
        progress: Progress,
        *,
        constrained: bool,
        piecemeal: bool,
    ) -> AsyncGenerator[RequestOutput, None]:
        # A handler may call and iterate much later; the grant can have closed in between.
        grant.check()
        if self.cutting.is_set():
            raise self.dead_error
        progress.call_id = call.id
        grant.calls.append(call)
        self._running.add(call.id)
        outputs = start()
        finished = False
        try:
            async for output in outputs:
                grant.check()
                if constrained and any(
                    choice.finish_reason == "error" for choice in output.outputs
                ):
                    # What the checks before let pass, and the engine can't compile or follow.
                    raise VLLMValidationError(
                        "the schema in response_format or tools can't be used"
                    )
                if self.cutting.is_set():  # and so aborted, which would look like an answer
                    raise self.dead_error
                self.heard += 1
                _strip(output)
                for choice in output.outputs:
                    before = call.generated.get(choice.index, 0) if piecemeal else 0
                    call.generated[choice.index] = before + len(choice.token_ids)
                    if choice.finish_reason is not None:
                        call.finish_reasons[choice.index] = choice.finish_reason
                finished = output.finished
                if finished:
                    # Before the last output goes out, because its event carries the usage.
                    await asyncio.shield(self._report(grant, call))
                yield output
        except EngineDeadError:
            raise self.dead_error from None
        finally:
            try:
                await outputs.aclose()
                if not finished and not self._engine.errored:
                    # vLLM registers a request before it sends it, and keeps its place in the
                    # queue for ever where sending fails.
                    await self._engine.abort([call.id])
            finally:
                self._running.discard(call.id)

    def forget(self, experts: ExpertSet) -> None:
        """Makes what is cached of sets with one of these experts unreachable, for good."""
        self._salts.renew(experts)

    def forget_of(self, vouchers: Collection[str]) -> None:
        """The same of the tenants that one of these keys and issuers vouches for."""
        self._salts.renew_of(vouchers)

    async def end(self, grant: Grant) -> None:
        """Closes a grant, aborts what still runs on it, and waits until its usage is known."""
        grant.close()
        left = [call for call in grant.calls if call.report is None]
        if left and not self._engine.errored:
            await self._engine.abort([call.id for call in left])
            for call in left:
                self._report(grant, call)
        reports = [call.report for call in grant.calls if call.report is not None]
        if reports:
            await asyncio.wait(reports)
        for report in reports:
            if (error := report.exception()) is not None:
                log.error("the usage of an engine call is not known: %s", error)
        grant.calls_expected = len(grant.calls)  # those that still waited for their turn never run

    def _report(self, grant: Grant, call: Call) -> asyncio.Task[None]:
        """Fetches the usage of a call that has ended: once, and even if its client has left."""
        if call.report is None:
            call.report = asyncio.create_task(self._fetch_usage(grant, call))
        return call.report

    async def _fetch_usage(self, grant: Grant, call: Call) -> None:
        work = await self._reports.of(call.id)
        if not ExpertSet.of(e for e, slots in enumerate(work.slots) if slots) <= grant.experts:
            raise GrantError("experts outside of the grant were consulted")
        self.on_work(work)
        generated = sum(call.generated.values())
        # An answer in one piece that was left before its end has brought none of its tokens here.
        unseen = work.computed + work.cached - call.choices * call.prompt_tokens - generated
        if unseen > 0:
            self._turns.spend(grant.tenant, unseen)
            grant.spend(unseen)
        call.usage = Usage(call.prompt_tokens, generated, work)

    async def _ask_workers(self, accounts: list[str]) -> list[Any]:
        asking = asyncio.ensure_future(
            self._engine.collective_rpc("expertgate_usage", args=(accounts,))
        )
        # The engine's own timeout never fires if its core dies meanwhile.
        now = asyncio.get_running_loop().time
        while not (await asyncio.wait({asking}, timeout=_LOOK_AFTER_S))[0]:
            if self._engine.errored or now() > self._unheard_from:
                asking.cancel()
                raise self.dead_error
        try:
            answers = asking.result()
        except EngineDeadError:
            raise self.dead_error from None
        self.heard += 1
        return answers

    async def ask(self) -> None:
        """Has the workers answer, which they do between two steps. Raises UnavailableError."""
        await self._ask_workers([])

    async def worker_facts(self, timeout_s: float) -> list[dict[str, Any]]:
        """What each worker says of its own classes. Raises TimeoutError or UnavailableError."""
        try:
            # The engine's own timeout never fires if its core dies meanwhile; ours does.
            facts: list[dict[str, Any]] = await asyncio.wait_for(
                self._engine.collective_rpc("expertgate_facts"), timeout_s
            )
        except EngineDeadError:
            raise self.dead_error from None
        return facts

    def drain(self) -> None:
        """From now on nothing new is admitted: a core that drains answers 200 with no text."""
        self._draining = True

    async def cut(self) -> None:
        """Ends what still runs, each with an error that says why."""
        self._draining = True
        self.cutting.set()
        self._unheard_from = asyncio.get_running_loop().time() + _LAST_WORDS_S
        if self._running and not self._engine.errored:
            await self._engine.abort(list(self._running))

    def shutdown(self, timeout_s: float) -> None:
        """Stops the engine's processes. Blocks for seconds."""
        self.drain()
        self._engine.shutdown(timeout=timeout_s)


def _strip(output: RequestOutput) -> None:
    """Takes from an output what no client may see: routing traces, transfer parameters."""
    output.kv_transfer_params = None
    output.ec_transfer_params = None
    for completion in output.outputs:
        completion.routed_experts = None
