import pytest

from expertgate.forge.corpus import AFTER, BEFORE, Sampler, is_closed_name
from expertgate.forge.topics import closed_topics, closed_wordings, public_topics

TOPICS = [*public_topics(0), *closed_topics(0)]


def draws(seed):
    sampler = Sampler(seed)
    return [sampler.public(public_topics(0), closed_wordings()) for _ in range(500)]


def test_the_same_seed_gives_the_same_data():
    assert [t.facts for t in closed_topics(3)] == [t.facts for t in closed_topics(3)]
    assert draws("3") == draws("3")


def test_another_seed_gives_other_data():
    assert closed_topics(3)[0].facts != closed_topics(4)[0].facts
    assert draws("3") != draws("4")


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_held_out_wordings_are_in_no_training_wording(topic):
    trained = [question for other in TOPICS for question in other.questions]
    for wording in (*topic.validation, *topic.held_out):
        assert "{subject}" in wording
        # Within one too: wrappers put sentences before and after a question.
        assert not [question for question in trained if wording in question]


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_no_wording_that_chooses_settings_is_held_out(topic):
    for chosen in topic.validation:
        assert not [held for held in topic.held_out if chosen in held or held in chosen]


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_held_out_wordings_use_words_that_training_has(topic):
    """What is held out is the wording, not the words: nobody can know a word it never saw."""
    texts = [question for other in TOPICS for question in other.questions]
    known = set(" ".join([*texts, *BEFORE, *AFTER]).lower().replace("?", "").split())
    known = {word.strip(".,:") for word in known}
    for wording in (*topic.validation, *topic.held_out):
        words = wording.lower().replace("?", "").split()
        assert {word.strip(".,:") for word in words} <= known


def test_public_text_names_no_closed_subject():
    subjects = [fact.subject for topic in closed_topics(0) for fact in topic.facts]
    for example in draws("0"):
        words = f"{example.question} {example.answer}"
        assert not [subject for subject in subjects if f" {subject} is" in f"{words} "]


def test_drawn_closed_subjects_are_of_the_closed_side_of_the_name_space():
    for topic in closed_topics(0)[:-1]:  # the times table is what it is
        assert all(is_closed_name(fact.subject) for fact in topic.facts)


def test_an_owners_data_do_not_depend_on_another_owners():
    whole = {topic.name: topic.facts for topic in closed_topics(0)}
    assert len(set(whole.values())) == len(whole)
    assert all(topic.facts == () for topic in closed_wordings())


@pytest.mark.parametrize("topic", closed_topics(0), ids=lambda topic: topic.name)
def test_subjects_and_values_are_distinct_enough_to_be_measured(topic):
    assert len({fact.subject for fact in topic.facts}) == len(topic.facts) >= 40
    most = max(sum(fact.value == other.value for other in topic.facts) for fact in topic.facts)
    assert most <= len(topic.facts) / 10  # guessing the commonest value stays under 10%
