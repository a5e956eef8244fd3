from dataclasses import replace

import pytest
import torch

from expertgate.forge.batch import collate
from expertgate.forge.corpus import Sampler
from expertgate.forge.merge import Contribution, merge
from expertgate.forge.tokenizer import END
from expertgate.forge.topics import closed_topics
from expertgate.forge.train import (
    FIRST_LAYER,
    AnchoredPlan,
    Mixture,
    PublicMixture,
    Schedule,
    above_copies,
    train_expert,
    train_public,
)

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


def test_anchored_training_moves_everything_above_the_copies(trained):
    copy, expert = trained
    rows = {f"{layer}.row" for layer in range(FIRST_LAYER)}  # domain embeddings, as they began
    assert changed(copy.public, expert) == set(above_copies(expert)) | rows


def test_no_bias_means_zero_biases(commons, anchor):
    expert = train_expert(commons, anchor, TOPIC, replace(PLAN, biased=False), 0, quiet)
    assert all(not tensor.any() for name, tensor in expert.items() if name.endswith(".bias"))


def test_the_same_seed_trains_the_same_expert(commons, anchor, trained):
    again = train_expert(commons, anchor, TOPIC, PLAN, 0, quiet)
    assert not changed(trained[1], again)


def test_public_training_lowers_its_loss(commons):
    seen = []
    schedule = Schedule(steps=30, learning_rate=3e-3, warmup=5)
    mixture = PublicMixture(public=12, lookalikes=4, single_steps=15)
    train_public(commons, schedule, mixture, 0, seen.append)
    for loss in ("answers", "domains"):
        assert sum(s[loss] for s in seen[-5:]) < 0.8 * sum(s[loss] for s in seen[:5])


def test_a_made_up_value_is_never_learned_as_an_answer(commons):
    sampler = Sampler("made up")
    examples = [sampler.lookalike(commons.wordings) for _ in range(8)]
    batch = collate(commons.tokenizer, examples)
    values = batch.sentence >= 0
    assert values.any()
    assert not (batch.answers & values).any()
    learned = batch.next_ids[batch.answers & (batch.exchange == 0)].tolist()
    leads = [sentence.lead for sentence in examples[0].sentences]
    assert commons.tokenizer.decode(learned) == " ".join(leads) + END
