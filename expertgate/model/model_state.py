"""The masks of Model Runner V2, which vLLM uses on GPUs."""

from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from expertgate.model.ledger import Scheduled, account_of
from expertgate.model.masks import requested
from expertgate.policies.expert_set import PUBLIC_ONLY


class MaskedModelState(DefaultModelState):
    """Holds each request's mask in a table on the device, by its slot, and arms real steps.

    The table is written on the device in the order of the steps, from memory that no later step
    reuses, so a step that still runs never sees the next one's requests. A dummy batch names the
    slots of live requests, and so runs at rest: only `preprocess_state`, which real batches alone
    pass through, arms the masks. The ledger settles a step when the next one comes, real or dummy,
    or when totals are asked for: by then its work is queued on the device, and nothing waits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks = self.model.masks
        self.ledger = self.model.ledger
        # Now, and not in the first step: torch's own compilation (mode 1) traces the whole model,
        # and takes no cached property that is still to be found out.
        _ = self.model.plain_on_cpu
        self.slots = torch.full(
            (self.max_num_reqs,), PUBLIC_ONLY.signed, dtype=torch.int64, device=self.device
        )
        self._slot_of: dict[str, int] = {}
        # Slot → word, to be written before the next real step. A dictionary, because a slot that
        # was freed and taken again within one step must end with the taker's mask alone.
        self._staged: dict[int, int] = {}
        self._account_of: dict[str, str | None] = {}
        self._armed_batch: object = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        extra_args = params.extra_args if params is not None else None
        wanted = requested(extra_args)
        self._slot_of[new_req_data.req_id] = req_index
        self._account_of[new_req_data.req_id] = account_of(extra_args)
        self._staged[req_index] = wanted.signed

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._account_of.pop(req_id, None)
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self._staged[slot] = PUBLIC_ONLY.signed

    def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        super().preprocess_state(input_batch, *args, **kwargs)
        self._write_staged()
        self.masks.arm(
            self.slots[input_batch.idx_mapping[: input_batch.num_reqs].to(torch.int64)],
            input_batch.query_start_loc[: input_batch.num_reqs + 1],
            input_batch.num_tokens_after_padding,
        )
        self.ledger.begin(
            Scheduled(name, self._account_of.get(name), int(start), int(length))
            for name, start, length in zip(
                input_batch.req_ids,
                input_batch.num_computed_tokens_np,
                input_batch.num_scheduled_tokens,
                strict=True,
            )
        )
        self._armed_batch = input_batch

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        if input_batch is not self._armed_batch:
            self.masks.rest()
            self.ledger.settle()
        self._armed_batch = None
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.masks.rest()
        self.ledger.settle()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)

    def _write_staged(self) -> None:
        if not self._staged:
            return
        slots = async_tensor_h2d(list(self._staged), device=self.device, dtype=torch.int64)
        words = async_tensor_h2d(list(self._staged.values()), device=self.device, dtype=torch.int64)
        self.slots.index_copy_(0, slots, words)
        self._staged.clear()
