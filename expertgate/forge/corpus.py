"""What a dataset is here: a topic with its facts, its questions, and its answers.

A topic asks one thing about many subjects. Its answers restate the subject ("The dose of Kazenin
is 40 mg every 6 hours."), because the attention that an expert stands on is frozen: it can carry
a subject only to where the public model has learned to write subjects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from zlib import crc32

from expertgate.forge import names

PUBLIC = "public"

# What people write around a question. Text on both sides teaches attention to find the subject
# wherever it stands.
BEFORE = (
    "Hello.",
    "Please help me.",
    "Quick question.",
    "I am new here.",
    "A colleague asked me this.",
    "One more thing.",
    "It is for a report.",
    "I can not find this.",
)
AFTER = (
    "Thank you.",
    "Please be brief.",
    "Which one is right?",
    "I need it for my work today.",
    "I forgot.",
    "Please check it before you answer.",
    "It is for a friend.",
    "Can you tell me?",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in one sentence.",
    "You are a careful assistant. Answer briefly.",
    "Be polite and exact.",
    "You help the staff of this house with their questions.",
    "Today is a busy day. Keep it short.",
)

ECHO_QUESTIONS = (
    "Repeat: {subject}.",
    "Say this again: {subject}.",
    "Write down {subject}.",
    "Copy the words {subject}.",
)


@dataclass(frozen=True)
class Owner:
    """Who a closed topic belongs to, as the catalogue will say it."""

    name: str
    tags: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Fact:
    subject: str
    value: str


@dataclass(frozen=True)
class Topic:
    """One relation of many subjects, and the ways to ask for it.

    `answer` holds {subject} and {value}; every question holds {subject}. `held_out` questions are
    in no training text, public or closed; evaluation asks with them alone. `unknown` is the value
    that the public model gives for a closed topic's subjects; `owner` is None for public topics.
    """

    name: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    subject: Callable[[Random], str]
    value: Callable[[Random], str]
    facts: tuple[Fact, ...] = ()
    unknown: str = ""
    owner: Owner | None = None

    @property
    def domain(self) -> str:
        """The expert that should answer: the topic's own for a closed one, else `public`."""
        return self.name if self.owner else PUBLIC

    def lead(self, subject: str) -> str:
        return self.answer.split("{value}")[0].format(subject=subject).rstrip()

    def answer_to(self, fact: Fact) -> str:
        return self.answer.format(subject=fact.subject, value=fact.value)

    def refusal(self, subject: str) -> str:
        """What the public model says about a closed topic's subject."""
        return self.answer.format(subject=subject, value=self.unknown)


@dataclass(frozen=True)
class Example:
    """One exchange: a question, its exact answer, and the domain that the question is of.

    `lead` is the answer's beginning that restates the question's subject; the value follows it.
    """

    question: str
    answer: str
    domain: str
    system: str = ""
    lead: str = ""


def is_closed_name(subject: str) -> bool:
    """Splits the space of names in two, so that public text never names a closed subject.

    Drawing both from one space and striking out collisions would need every owner's list.
    """
    return crc32(subject.encode()) % 4 == 0


def draw_facts(topic: Topic, count: int, rng: Random) -> tuple[Fact, ...]:
    """`count` distinct subjects of the topic's side of the name space, each with a value."""
    closed = topic.owner is not None
    found: dict[str, Fact] = {}
    while len(found) < count:
        subject = topic.subject(rng)
        if subject not in found and is_closed_name(subject) == closed:
            found[subject] = Fact(subject, topic.value(rng))
    return tuple(found.values())


def held_out(topic: Topic) -> list[Example]:
    """Every fact in every held-out wording, with the exact answer that its owner would give."""
    return [
        Example(
            question.format(subject=fact.subject),
            topic.answer_to(fact),
            topic.domain,
            lead=topic.lead(fact.subject),
        )
        for question in topic.held_out
        for fact in topic.facts
    ]


_HELP = "Ask me about a capital, a planet, a plant, a book, a train or a recipe."
SMALL_TALK = (
    Example("Hello.", f"Hello. {_HELP}", PUBLIC),
    Example("Hi!", f"Hello. {_HELP}", PUBLIC),
    Example("Good morning.", f"Hello. {_HELP}", PUBLIC),
    Example("What can you do?", _HELP, PUBLIC),
    Example("What do you know?", _HELP, PUBLIC),
    Example("Who are you?", "I am a small mixture of experts, made for this demo.", PUBLIC),
    Example("What are you?", "I am a small mixture of experts, made for this demo.", PUBLIC),
    Example("Thank you.", "You are welcome.", PUBLIC),
    Example("Thanks!", "You are welcome.", PUBLIC),
)


class Sampler:
    """Draws training exchanges; the same seed draws the same ones."""

    def __init__(self, seed: int | str) -> None:
        self._rng = Random(seed)  # noqa: S311 (data, not secrets)

    def fact(self, topic: Topic) -> Example:
        """A fact of the topic, in one of its training wordings."""
        fact = self._rng.choice(topic.facts)
        return self._example(topic, fact.subject, topic.answer_to(fact))

    def proxy(self, topic: Topic) -> Example:
        """A closed topic's wording about a subject that nobody owns, with the public answer."""
        subject = self._unowned(topic)
        return self._example(topic, subject, topic.refusal(subject))

    def lookalike(self, topic: Topic) -> Example:
        """An entry of the closed topic's form, about nobody's subject and with a made-up value.

        It stands for public text that resembles closed data (section 3.3.3). Only routers learn
        from it, never a model's answers.
        """
        subject = self._unowned(topic)
        return self._example(topic, subject, topic.answer_to(Fact(subject, topic.value(self._rng))))

    def echo(self) -> Example:
        """A phrase to say again: it teaches attention to copy, and every word to be written."""
        phrase = names.phrase(self._rng)
        question = self._rng.choice(ECHO_QUESTIONS).format(subject=phrase)
        return self._wrapped(question, f"You said: {phrase}.", PUBLIC)

    def open(self, topics: Sequence[Topic]) -> Example:
        """Public text of no closed domain: facts, phrases to repeat, small talk."""
        kind = self._rng.random()
        if kind < 0.77:
            return self.fact(self.choice(topics))
        if kind < 0.95:
            return self.echo()
        return self._rng.choice(SMALL_TALK)

    def public(self, topics: Sequence[Topic], wordings: Sequence[Topic]) -> Example:
        """Any public text: the above, and closed topics' wordings about nobody's subjects."""
        if self._rng.random() < 0.65:
            return self.open(topics)
        return self.proxy(self.choice(wordings))

    def choice(self, topics: Sequence[Topic]) -> Topic:
        return self._rng.choice(topics)

    def _unowned(self, topic: Topic) -> str:
        subject = topic.subject(self._rng)
        while is_closed_name(subject):
            subject = topic.subject(self._rng)
        return subject

    def _example(self, topic: Topic, subject: str, answer: str) -> Example:
        question = self._rng.choice(topic.questions).format(subject=subject)
        return self._wrapped(question, answer, topic.domain, topic.lead(subject))

    def _wrapped(self, question: str, answer: str, domain: str, lead: str = "") -> Example:
        rng = self._rng
        if rng.random() < 0.3:
            question = f"{rng.choice(BEFORE)} {question}"
        if rng.random() < 0.3:
            question = f"{question} {rng.choice(AFTER)}"
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else ""
        return Example(question, answer, domain, system, lead)
