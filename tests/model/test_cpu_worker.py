"""The masks of Model Runner V1, driven by hand; the engine tests drive it for real."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from expertgate.model import cpu_drafts
from expertgate.model.cpu_worker import MaskedCPUModelRunner
from expertgate.model.flex_olmo import FlexOlmoForCausalLM
from expertgate.model.ledger import ACCOUNT_ARG
from expertgate.model.masks import EXTRA_ARG, TokenMasks
from expertgate.policies.expert_set import PUBLIC_ONLY
from tests.support.model_state import new_ledger

PUBLIC = PUBLIC_ONLY.signed
AT_REST = [PUBLIC] * 16


class _SeenError(Exception):
    """Carries the words that vLLM's own method would have read."""


@pytest.fixture
def runner(monkeypatch):
    def stop(self, *args):
        raise _SeenError(self.model.masks.words.tolist())

    for method in ("_preprocess", "_dummy_run", "execute_model"):
        monkeypatch.setattr(CPUModelRunner, method, stop)
    made = object.__new__(MaskedCPUModelRunner)
    model = object.__new__(FlexOlmoForCausalLM)
    torch.nn.Module.__init__(model)
    model.masks = TokenMasks(16, torch.device("cpu"))
    model.ledger = new_ledger()
    model.config = SimpleNamespace(num_experts=7)
    made.__dict__["model"] = model
    return made


def seen(call, *args):
    with pytest.raises(_SeenError) as caught:
        call(*args)
    return caught.value.args[0]


def schedule(runner, requests):
    """`requests`: id, mask, tokens, in the order of their rows."""
    runner.input_batch = SimpleNamespace(req_ids=[name for name, _, _ in requests])
    runner.requests = {
        name: SimpleNamespace(
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args={EXTRA_ARG: mask, ACCOUNT_ARG: name}),
        )
        for name, mask, _ in requests
    }
    return SimpleNamespace(num_scheduled_tokens={name: count for name, _, count in requests})


def test_masks_follow_ids_when_rows_move(runner):
    """Threats c1, c4: vLLM swaps and condenses rows as requests come and go."""
    step = [("a", 127, 2), ("b", 1, 3), ("c", 5, 1)]
    got = seen(runner._preprocess, schedule(runner, step), 8)
    assert got[:8] == [127, 127, 1, 1, 1, 5, PUBLIC, PUBLIC]
    moved = [("c", 5, 1), ("b", 1, 1)]
    got = seen(runner._preprocess, schedule(runner, moved), 8)
    assert got == [5, 1, *AT_REST[2:]]


def test_a_step_leaves_nothing_open_even_when_it_fails(runner):
    """Threats c3, c5."""
    seen(runner._preprocess, schedule(runner, [("a", 127, 4)]), 8)
    seen(runner.execute_model, SimpleNamespace(scheduled_spec_decode_tokens={}))
    assert runner.model.masks.words.tolist() == AT_REST


def test_profiling_runs_every_expert_and_leaves_nothing_open(runner):
    assert seen(runner._dummy_run, 4) == [127] * 16
    assert runner.model.masks.words.tolist() == AT_REST


def test_a_grammars_rows_are_those_of_the_drafts_that_run(runner, monkeypatch):
    """Threat c5: one request's row may not become the next one's."""
    step = SchedulerOutput.make_empty()
    step.scheduled_spec_decode_tokens = {"a": [3, 4], "b": [-1, -1], "d": [5]}
    step.num_scheduled_tokens = {"a": 3, "b": 3, "c": 1, "d": 2}
    step.total_num_scheduled_tokens = 9
    runs = cpu_drafts.without_made_up(step)
    assert runs.scheduled_spec_decode_tokens == {"a": [3, 4], "d": [5]}
    assert runs.num_scheduled_tokens == {"a": 3, "b": 1, "c": 1, "d": 2}
    assert runs.total_num_scheduled_tokens == 7
    assert step.total_num_scheduled_tokens == sum(step.num_scheduled_tokens.values())
    grammars = GrammarOutput(["b", "c", "d"], np.arange(6)[:, None])  # b 0 to 2, c 3, d 4 and 5
    allowed = cpu_drafts.as_it_runs(grammars, step).grammar_bitmask
    assert allowed.flatten().tolist() == [0, 3, 4, 5]
    # So they do in the runner, whose step and whose sampling are two calls.
    given = []
    monkeypatch.setattr(CPUModelRunner, "execute_model", lambda _, runs: given.append(runs))
    monkeypatch.setattr(CPUModelRunner, "sample_tokens", lambda _, rows: given.append(rows))
    runner.discard_request_mask = SimpleNamespace(np=np.zeros(4, dtype=bool))
    runner.input_batch = SimpleNamespace(generators={})
    runner.execute_model(step)
    runner.sample_tokens(grammars)
    runner.sample_tokens(None)
    assert given[0] == runs
    assert given[1].grammar_bitmask.flatten().tolist() == [0, 3, 4, 5]
    assert given[2] is None
