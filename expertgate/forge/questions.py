"""What evaluation asks: questions in wordings that no training text has."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from expertgate.forge.corpus import PUBLIC, Example, Fact, Topic

Wordings = Callable[[Topic], Sequence[str]]

JOINT = "joint"
"""The group of questions that ask for three things at once."""

# Three topics that three of the demo's users may consult one each.
_JOINT_TOPICS = ("formulary", "cases", "api")
_JOINT_COUNT = 120


def held_out(topic: Topic) -> Sequence[str]:
    """The wordings that say how well a model does."""
    return topic.held_out


def validation(topic: Topic) -> Sequence[str]:
    """The wordings by which settings are chosen."""
    return topic.validation


def ask(topic: Topic, wordings: Wordings) -> list[Example]:
    """Every fact in each of the wordings, with the exact answer that its owner would give."""
    return [
        Example(wording.format(subject=fact.subject), (topic.says(fact),))
        for wording in wordings(topic)
        for fact in topic.facts
    ]


@dataclass(frozen=True)
class Joint:
    """One question of several parts, each of another closed topic."""

    question: str
    parts: tuple[tuple[Topic, Fact], ...]

    def answered(self, present: Collection[str]) -> Example:
        """As the experts present should answer: what an absent one knows is not public."""
        return Example(
            self.question,
            tuple(
                topic.says(fact) if topic.name in present else topic.refuses(fact.subject)
                for topic, fact in self.parts
            ),
        )


def ask_jointly(topics: Sequence[Topic], wordings: Wordings, count: int) -> list[Joint]:
    """`count` questions, each with a fact of every topic; facts and wordings take turns."""
    found = []
    for number in range(count):
        parts = [(topic, topic.facts[number % len(topic.facts)]) for topic in topics]
        asked = [
            wordings(topic)[number % len(wordings(topic))].format(subject=fact.subject)
            for topic, fact in parts
        ]
        found.append(Joint(" ".join(asked), tuple(parts)))
    return found


class Questions:
    """All questions of some wordings, by group: the domain that they are of, or JOINT."""

    def __init__(
        self, public: Sequence[Topic], closed: Sequence[Topic], wordings: Wordings
    ) -> None:
        self.joint = ask_jointly(
            [topic for topic in closed if topic.name in _JOINT_TOPICS], wordings, _JOINT_COUNT
        )
        self.by_domain = {PUBLIC: [e for topic in public for e in ask(topic, wordings)]}
        self.by_domain |= {topic.name: ask(topic, wordings) for topic in closed}

    def of(self, present: Collection[str]) -> dict[str, list[Example]]:
        """With the answers that the experts present should give."""
        return self.by_domain | {JOINT: [asked.answered(present) for asked in self.joint]}
