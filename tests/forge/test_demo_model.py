"""The shipped model keeps what its card promises."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertgate.forge import card, checkpoint
from expertgate.forge.corpus import PUBLIC, Example, Sentence
from expertgate.forge.evaluate import exact, expert_sets
from expertgate.forge.questions import Questions, held_out
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
SETS = expert_sets(NAMES[1:])
QUESTIONS = Questions(public_topics(0), CLOSED, held_out)


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((MODEL / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def questions():
    return json.loads((DEMO / "questions.json").read_text())


@pytest.fixture(scope="module")
def samples(questions):
    return questions["single"]


@pytest.fixture(scope="module")
def joint(questions):
    return questions["joint"]


@pytest.fixture(scope="module")
def model():
    """In fp32, as the evaluation; a CPU without bf16 takes ten times as long for it."""
    return checkpoint.read(MODEL, torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def accuracy(model, tokenizer, label, group):
    """Of every third question: all wordings, a third of the facts in each."""
    shape, shared, experts = model
    present = SETS[label]
    chosen = [experts[NAMES.index(name)] for name in present]
    right = exact(shape, shared, chosen, tokenizer, QUESTIONS.of(present)[group][::3])
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
    alone = PUBLIC if domain == PUBLIC else f"public+{domain}"
    found = [accuracy(model, tokenizer, label, domain) for label in (alone, "all")]
    assert min(found) >= 0.9
    assert max(found) - min(found) <= 0.03


def test_rounding_as_a_server_does_costs_little(model, tokenizer):
    served = checkpoint.read(MODEL, torch.bfloat16)
    found = [accuracy(weights, tokenizer, "all", "formulary") for weights in (model, served)]
    assert abs(found[0] - found[1]) <= 0.05


@pytest.mark.parametrize("domain", NAMES[1:])
def test_without_its_expert_a_domain_is_not_answered(model, tokenizer, domain):
    assert accuracy(model, tokenizer, f"all-{domain}", domain) <= 0.1


@pytest.fixture(scope="module")
def percent(evaluation):
    return card.as_percent(evaluation["right"], evaluation["questions"])


def test_the_evaluation_covers_every_set_and_finds_no_leak(percent):
    assert percent.keys() == SETS.keys()
    assert card.leak(percent) == 0


def test_every_domain_is_at_ninety_percent_in_every_set(percent):
    assert card.lowest(percent) >= 90


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
            asked = Example(sample["question"], (Sentence(sample[key]),))
            assert writes(oracle, tokenizer, present, asked), sample


def writes(oracle, tokenizer, present, asked):
    found = encode(tokenizer, asked)
    prompt, answer = found.ids[: found.answer], found.ids[found.answer :]
    return oracle.force(present, prompt, answer).best == answer


def test_hugging_face_answers_the_joint_question_by_who_is_present(joint, tokenizer):
    oracle = RowDeletion(MODEL, dtype=torch.bfloat16)
    assert joint["answers"].keys() == SETS.keys()
    for label, answer in joint["answers"].items():
        present = ExpertSet.of(NAMES.index(name) for name in SETS[label])
        assert writes(
            oracle, tokenizer, present, Example(joint["question"], (Sentence(answer),))
        ), label


def test_the_joint_question_has_another_answer_for_each_expert(joint):
    answers = {joint["answers"][f"public+{name}"] for name in ("formulary", "cases", "api")}
    assert len(answers | {joint["answers"]["public"], joint["answers"]["all"]}) == 5


def test_samples_show_what_an_expert_is_worth(samples):
    for sample in samples:
        assert sample["with"] == sample["all"] == sample["expected"]
        assert (sample["without"] == sample["expected"]) == (sample["domain"] == PUBLIC)
