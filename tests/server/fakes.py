"""An engine that records its calls and answers without a model."""

import asyncio
from types import SimpleNamespace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError


def output(text: str = "x", *, finished: bool = True) -> RequestOutput:
    completion = CompletionOutput(
        index=0, text=text, token_ids=[1], cumulative_logprob=None, logprobs=None
    )
    completion.routed_experts = [[[0, 1]]]
    found = RequestOutput("id", None, [1], None, [completion], finished)
    found.kv_transfer_params = {"host": "inside"}
    found.ec_transfer_params = {"host": "inside"}
    return found


class FakeEngine:
    def __init__(self, outputs: int = 1) -> None:
        self.calls: list[SimpleNamespace] = []
        self.aborted: list[str] = []
        self.errored = False
        self.dies = False
        self.refuses: Exception | None = None
        """Raised once the request is registered, as by a message that can't be encoded."""
        self.finish_reason: str | None = None
        self.computed, self.cached = 3, 0
        self.slots = [2, 0]
        """What each pipeline rank says of each call: tokens, and slots by expert."""
        self.asked: list[list[str]] = []
        self.ended = 0
        self.outputs = outputs
        self.vllm_config = self.model_config = self.renderer = self.input_processor = None

    async def generate(self, prompt: Any, params: Any, request_id: str, **rest: Any) -> Any:
        self.calls.append(
            SimpleNamespace(prompt=prompt, params=params, request_id=request_id, rest=rest)
        )
        try:
            for place in range(self.outputs):
                if self.dies:
                    raise EngineDeadError
                if self.refuses is not None:
                    raise self.refuses
                made = output(finished=place == self.outputs - 1)
                made.outputs[0].finish_reason = self.finish_reason
                yield made
        finally:
            self.ended += 1

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def collective_rpc(self, method: str, *, args: tuple[list[str]]) -> list[Any]:
        """Two pipeline ranks of two tensor ranks, a layer each; lists, as they come by message."""
        assert method == "expertgate_usage"
        (accounts,) = args
        self.asked.append(accounts)
        await asyncio.sleep(0)
        if self.dies:
            raise EngineDeadError
        weights = [slots << 32 for slots in self.slots]
        rank = [[1, self.computed, self.cached, self.slots, weights] for _ in accounts]
        return [rank, None, rank, None]

    async def encode(self, *args: Any) -> None: ...
