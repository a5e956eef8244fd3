"""Model Runner V2's state for one model, driven as its runner drives it, without a GPU."""

import functools
from types import SimpleNamespace

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from expertgate.model.ledger import ACCOUNT_ARG, Ledger
from expertgate.model.masks import EXTRA_ARG, TokenMasks
from expertgate.model.model_state import MaskedModelState
from expertgate.policies.expert_set import PUBLIC_ONLY

SLOTS, TOKENS = 8, 64
LAYERS, EXPERTS, TOP_K = 2, 7, 3
PUBLIC = PUBLIC_ONLY.signed


class _Bare(DefaultModelState):
    """Of vLLM's own state only what ours reads; the rest needs a loaded model."""

    def __init__(self, model, device):
        self.model, self.device, self.max_num_reqs = model, device, SLOTS
        self.rope_state = self.prompt_embeds_state = None
        self.supports_mm_inputs = False


class State(MaskedModelState, _Bare):
    """Ours, on top of that: `super()` in it leads to `_Bare`."""


class Model:
    """Of the model what the state asks."""

    def __init__(self, device):
        self.masks, self.ledger = TokenMasks(TOKENS, device), new_ledger()

    @functools.cached_property
    def plain_on_cpu(self):
        return False


def new_state():
    cpu = torch.device("cpu")
    return State(Model(cpu), cpu)


def new_ledger():
    return Ledger(
        num_layers=LAYERS,
        max_tokens=TOKENS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        renormalize=False,
        device=torch.device("cpu"),
    )


def request(name, mask, account=None):
    extra_args = None if mask is None else {EXTRA_ARG: mask, ACCOUNT_ARG: account}
    params = SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(req_id=name, sampling_params=params)


def batch(slots, lengths, padding=0, names=None, starts=None):
    """`names`: which request is in each slot; only usage asks. `starts`: tokens computed before."""
    return SimpleNamespace(
        num_reqs=len(slots),
        req_ids=names or [f"slot {slot}" for slot in slots],
        num_computed_tokens_np=np.array(starts or [0] * len(slots), dtype=np.int32),
        num_scheduled_tokens=np.array(lengths, dtype=np.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0),
        num_tokens_after_padding=sum(lengths) + padding,
    )


def run(state, made):
    """One real step, as `execute_model` orders the hooks; what the model would read."""
    state.apply_staged_writes()
    state.preprocess_state(made, (), None, None)
    state.prepare_inputs(made, None)
    return state.model.masks.words.tolist()


def run_dummy(state, made):
    state.prepare_inputs(made, None)
    return state.model.masks.words.tolist()


def rows(*pairs):
    tokens = [word for word, length in pairs for _ in range(length)]
    return tokens + [PUBLIC] * (TOKENS - len(tokens))
