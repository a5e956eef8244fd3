"""vLLM's CPU worker with the masks of Model Runner V1.

Model Runner V2 needs a Triton with a CPU back end; without one vLLM's CPU worker falls back to V1,
whose runner knows no per-model state. Given to vLLM as `worker_cls`.
"""

import os
from typing import Any

import numpy as np
import torch
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from expertgate.model import cpu_drafts, cpu_sampling
from expertgate.model.cpu_dense import batch_invariant, least_rows, multiplies_bfloat16, widen
from expertgate.model.flex_olmo import FlexOlmoForCausalLM
from expertgate.model.ledger import ReportsUsage, Scheduled, account_of
from expertgate.model.masks import requested
from expertgate.model.proof import ProvesMasks


class MaskedCPUModelRunner(CPUModelRunner):
    """Arms the masks for the length of one real step, and counts it; all else runs at rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step: Any = None
        """The one that runs, as the scheduler made it."""
        self.sampler.gather_logprobs = cpu_sampling.gather_logprobs
        rejection_sampler.expand_batch_to_tokens = cpu_sampling.expand_batch_to_tokens

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with batch_invariant():
            super().load_model(*args, **kwargs)
        if not multiplies_bfloat16():
            widen(self.model)

    def _determine_batch_execution_and_padding(
        self, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        # Filled up here, once a step, as for CUDA graphs; not in each layer.
        num_tokens = max(num_tokens, least_rows())
        return super()._determine_batch_execution_and_padding(num_tokens, *args, **kwargs)

    def _preprocess(self, scheduler_output: Any, num_input_tokens: int, *rest: Any) -> Any:
        assert num_input_tokens >= least_rows()
        # Masks go by request id, never by row: rows move while requests come and go.
        words, lengths, step = [], [], []
        requests, scheduled = self.requests, scheduler_output.num_scheduled_tokens
        for request_id in self.input_batch.req_ids:
            request = requests[request_id]
            asked = request.sampling_params.extra_args
            length = scheduled[request_id]
            words.append(requested(asked).signed)
            lengths.append(length)
            step.append(
                Scheduled(request_id, account_of(asked), request.num_computed_tokens, length)
            )
        by_token = np.repeat(np.array(words, dtype=np.int64), lengths)
        model = self._flex_olmo
        model.masks.arm_tokens(by_token, num_input_tokens)
        model.ledger.begin(step)
        return super()._preprocess(scheduler_output, num_input_tokens, *rest)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._step = scheduler_output
        try:
            runs = cpu_drafts.without_made_up(scheduler_output)
            output = super().execute_model(runs, *args, **kwargs)
            self._flex_olmo.ledger.settle()
            return output
        finally:
            self._flex_olmo.masks.rest()

    def sample_tokens(self, grammar_output: Any) -> Any:
        if grammar_output is not None:
            grammar_output = cpu_drafts.as_it_runs(grammar_output, self._step)
        read_in_part = self.discard_request_mask.np
        with cpu_sampling.without(self.input_batch.generators, read_in_part):
            return super().sample_tokens(grammar_output)

    def _input_fits_in_drafter(self, attention: Any) -> bool:
        # A draft is looked up, and ends where the model's length does. Where one request has no
        # room for drafts, vLLM would draft the word 0 for all.
        return attention is not None

    def _sample(self, logits: Any, drafts: Any) -> Any:
        cpu_sampling.keep_all(self.input_batch.sampling_metadata)
        if drafts is not None and not any(drafts.num_draft_tokens):
            # Where nobody has a draft, what looks at drafts takes the largest `top_k` among none,
            # and the engine dies.
            drafts = None
        return super()._sample(logits, drafts)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        # Memory is sized by these runs, so they must do the work of every expert.
        self._flex_olmo.masks.open_all(self.model.config.num_experts)
        try:
            return super()._dummy_run(*args, **kwargs)
        finally:
            self._flex_olmo.masks.rest()

    @property
    def _flex_olmo(self) -> FlexOlmoForCausalLM:
        assert isinstance(self.model, FlexOlmoForCausalLM)
        return self.model


class MaskedCPUWorker(ProvesMasks, ReportsUsage, CPUWorker):
    def init_device(self) -> None:
        # Else vLLM cuts a long context into parts for its threads, at places that depend on who
        # else is in the batch, and what is put together again has other last bits.
        os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = MaskedCPUModelRunner(self.vllm_config, torch.device("cpu"))
