"""Design, Exactness 1: a request gets what the model without the other experts would say.

Both sides compute in float32, where two correct implementations agree on every greedy token unless
two logits tie within rounding. In bfloat16 they need not, so there only log-probabilities are
compared.
"""

import statistics

import pytest
import torch

from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.demo import DEMO
from tests.support.engine import Ask, engine
from tests.support.oracle import RowDeletion

STEPS = 12


@pytest.fixture(scope="module", params=["random", "biased", "demo"])
def folder(request, tmp_path_factory):
    if request.param == "demo":
        return DEMO
    # Three shards, as released checkpoints have several; biases are read from one file.
    biases = request.param == "biased"
    path = tmp_path_factory.mktemp(request.param)
    return random_checkpoint(path, biases=biases, shards=1 if biases else 3)


@pytest.fixture(scope="module")
def prompt():
    return list(b"Who may consult which expert?")


def subsets(oracle):
    return [ExpertSet(mask) for mask in range(1, 1 << oracle.model.config.num_experts)]


def test_every_subset_answers_as_if_the_others_were_deleted(folder, prompt):
    """All subsets in one batch, so that each also has every other as its neighbour."""
    oracle = RowDeletion(folder)
    sets = subsets(oracle)
    with engine(folder) as served:
        answers = served.ask([Ask(prompt, experts, STEPS) for experts in sets])
    for experts, [answer] in zip(sets, answers, strict=True):
        forced = oracle.force(experts, prompt, answer.tokens)
        assert list(answer.tokens) == forced.best, experts.text
        # Float32 has 24 bits; a few thousand products a logit in another order lose about 8.
        assert answer.logprobs == pytest.approx(forced.logprobs, abs=2**-13), experts.text


def test_bfloat16_log_probabilities_are_within_its_rounding(folder, prompt):
    """The bound: bfloat16 has 8 bits, so each rounding moves a value by up to 2^-9 of itself.

    A residual stream passes about 8 roundings a layer (attention, two norms, router weight, expert
    in and out, two sums) in each implementation, on different values. They add up like a random
    walk over the 2 * 8 * layers of them, and a logit of size s moves by s * 2^-9 * sqrt(that). The
    median must lie below one such deviation. Single values may lie far above it, where rounding
    turns a close choice between two experts: that is bounded only in the median.
    """
    oracle = RowDeletion(folder, torch.float32)
    sets = subsets(oracle)
    with engine(folder, dtype="bfloat16") as served:
        answers = served.ask([Ask(prompt, experts, STEPS) for experts in sets])
    differences, sizes = [], []
    for experts, [answer] in zip(sets, answers, strict=True):
        forced = oracle.force(experts, prompt, answer.tokens)
        pairs = zip(answer.logprobs, forced.logprobs, strict=True)
        differences += [abs(ours - theirs) for ours, theirs in pairs]
        sizes += [abs(value) for value in forced.logprobs]
    layers = oracle.model.config.num_hidden_layers
    size = max(1.0, statistics.fmean(sizes))
    assert statistics.median(differences) < size * 2**-9 * (16 * layers) ** 0.5
