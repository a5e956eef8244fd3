from dataclasses import replace

import pytest
import torch

from expertgate.forge.corpus import Sampler
from expertgate.forge.merge import Contribution, merge
from expertgate.forge.topics import closed_topics
from expertgate.forge.train import (
    FIRST_LAYER,
    AnchoredPlan,
    Mixture,
    Schedule,
    train_expert,
    train_public,
)
from expertgate.forge.tune import TuningPlan, tune_routers

TOPIC = closed_topics(0)[0]
FEW = Schedule(steps=3, learning_rate=1e-2, warmup=1)
PLAN = AnchoredPlan(FEW, Mixture(own=4, wordings=2, public=4, lookalikes=2), margin=4.0)


def quiet(losses):
    pass


def bits(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def trained(commons, anchor):
    """A copy of the anchor, and an expert trained beside it for a few steps."""
    copy = anchor.copy()
    return copy, train_expert(commons, copy, TOPIC, PLAN, 0, quiet)


def test_anchored_training_leaves_every_frozen_bit(anchor, trained):
    copy, expert = trained
    assert len(merge(anchor, {TOPIC.name: Contribution(copy, expert)})) == 2


def test_anchored_training_moves_everything_but_the_ffns_that_stay_copies(trained):
    copy, expert = trained
    copied = {name for name in expert if name.endswith("_proj") and int(name[0]) < FIRST_LAYER}
    assert copied
    assert changed(copy.public, expert) == set(expert) - copied


def test_no_bias_means_zero_biases(commons, anchor):
    expert = train_expert(commons, anchor, TOPIC, replace(PLAN, biased=False), 0, quiet)
    assert all(not tensor.any() for name, tensor in expert.items() if name.endswith(".bias"))


def test_the_same_seed_trains_the_same_expert(commons, anchor, trained):
    again = train_expert(commons, anchor, TOPIC, PLAN, 0, quiet)
    assert not changed(trained[1], again)


def test_router_tuning_moves_rows_and_biases_of_closed_experts_alone(commons, anchor, trained):
    members = [anchor.public, trained[1], bits(trained[1])]
    before = [bits(member) for member in members]
    two = replace(commons, wordings=commons.wordings[:2])
    tune_routers(two, anchor.shared, members, TuningPlan(FEW, 16, margin=4.0), 0, quiet)
    assert not changed(before[0], members[0])
    for old, new in zip(before[1:], members[1:], strict=True):
        moved = changed(old, new)
        assert moved
        assert all(name.endswith((".row", ".bias")) for name in moved)


def test_router_tuning_sees_no_closed_data(commons, anchor, trained, monkeypatch):
    def refuse(self, topic):
        assert topic.owner is None, "a closed topic's facts"
        return drawn(self, topic)

    drawn = Sampler.fact
    monkeypatch.setattr(Sampler, "fact", refuse)
    one = replace(commons, wordings=commons.wordings[:1])
    members = [anchor.public, trained[1]]
    tune_routers(one, anchor.shared, members, TuningPlan(FEW, 16, margin=4.0), 0, quiet)


def test_public_training_lowers_its_loss(commons):
    seen = []
    schedule = Schedule(steps=30, learning_rate=3e-3, warmup=5)
    train_public(commons, schedule, 16, 0, lambda losses: seen.append(losses["answers"]))
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
