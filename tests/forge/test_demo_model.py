"""The shipped model keeps what its card promises."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertgate.forge import card, checkpoint
from expertgate.forge.corpus import PUBLIC, Example, held_out
from expertgate.forge.evaluate import exact, expert_sets
from expertgate.forge.tokenizer import encode
from expertgate.forge.topics import closed_topics, public_topics
from expertgate.model import catalogue
from expertgate.model.checkpoint import Checkpoint
from expertgate.policies.expert_set import ExpertSet
from tests.support.oracle import RowDeletion

DEMO = Path(str(files("expertgate") / "demo"))
MODEL = DEMO / "model"
CLOSED = closed_topics(0)
NAMES = [PUBLIC, *(topic.name for topic in CLOSED)]


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((MODEL / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def samples():
    return json.loads((DEMO / "questions.json").read_text())


@pytest.fixture(scope="module")
def model():
    return checkpoint.read(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def sampled(domain):
    """Every third held-out question of a domain: all wordings, a third of the facts in each."""
    if domain == PUBLIC:
        return [example for topic in public_topics(0) for example in held_out(topic)][::3]
    return held_out(next(topic for topic in CLOSED if topic.name == domain))[::3]


def accuracy(model, tokenizer, present, domain):
    shape, shared, experts = model
    chosen = [experts[NAMES.index(name)] for name in present]
    right = exact(shape, shared, chosen, tokenizer, sampled(domain))
    return sum(right) / len(right)


def test_the_catalogue_fits_the_weights_and_their_hashes():
    shipped = catalogue.load(Checkpoint(MODEL))
    assert [expert.name for expert in shipped.experts] == NAMES
    assert all(expert.sha256 for expert in shipped.experts)
    owners = {expert.owner for expert in shipped.experts if expert.license == "closed"}
    assert len(owners) == len(CLOSED) >= 5


def test_the_weights_are_bf16_and_small():
    assert (MODEL / "model.safetensors").stat().st_size <= 8 << 20
    _, shared, experts = checkpoint.read(MODEL)
    assert shared["lm_head.weight"].dtype == experts[1]["0.row"].dtype == torch.bfloat16


@pytest.mark.parametrize("domain", NAMES)
def test_with_its_expert_a_domain_is_answered_and_others_move_it_little(model, tokenizer, domain):
    sets = expert_sets(NAMES[1:])
    own = sets["public"] if domain == PUBLIC else sets[f"public+{domain}"]
    alone = accuracy(model, tokenizer, own, domain)
    together = accuracy(model, tokenizer, sets["all"], domain)
    # The goal is 0.9 for both, and 0.03 between them; docs/forge-log.md says what is still missing.
    assert alone >= 0.9
    assert together >= 0.85


@pytest.mark.parametrize("domain", NAMES[1:])
def test_without_its_expert_a_domain_is_not_answered(model, tokenizer, domain):
    assert accuracy(model, tokenizer, expert_sets(NAMES[1:])[f"all-{domain}"], domain) <= 0.1


@pytest.fixture(scope="module")
def percent(evaluation):
    return {
        label: {name: 100 * n / evaluation["questions"][name] for name, n in row.items()}
        for label, row in evaluation["right"].items()
    }


def test_the_evaluation_covers_every_set_and_finds_no_leak(percent):
    assert percent.keys() == expert_sets(NAMES[1:]).keys()
    assert card.leak(percent) == 0
    assert card.lowest(percent) >= 89


@pytest.mark.xfail(strict=True, reason="with all five present, the newsroom falls just below 90%")
def test_every_domain_is_at_ninety_percent_in_every_set(percent):
    assert card.lowest(percent) >= 90


@pytest.mark.xfail(strict=True, reason="experts still take some of each other's tokens")
def test_no_domain_moves_by_more_than_three_points(percent):
    assert card.moved(percent) <= 3


def test_the_card_quotes_the_evaluation(evaluation):
    assert (MODEL / "README.md").read_text() == card.write(evaluation, CLOSED)


def test_hugging_face_writes_the_sampled_answers(samples, tokenizer):
    """The samples are real: Hugging Face's model with the other rows deleted chooses each token."""
    oracle = RowDeletion(MODEL, dtype=torch.bfloat16)
    for sample in samples:
        own = {0} | {NAMES.index(sample["domain"])}
        for key, present in (
            ("with", ExpertSet.of(own)),
            ("all", ExpertSet.first(len(NAMES))),
            ("without", ExpertSet.of([0])),
        ):
            ids, start, _ = encode(tokenizer, Example(sample["question"], sample[key], PUBLIC))
            assert oracle.force(present, ids[:start], ids[start:]).best == ids[start:], sample


def test_samples_show_what_an_expert_is_worth(samples):
    for sample in samples:
        assert sample["with"] == sample["all"] == sample["expected"]
        assert (sample["without"] == sample["expected"]) == (sample["domain"] == PUBLIC)
