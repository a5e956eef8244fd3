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

# How a question is asked within a sentence of another, as "Do you know who wrote …?".
OPENERS = ("I want to know", "Do you know", "Can you say", "My question is")
_ASKING = ("Who", "What", "When", "Where", "Which", "How")

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
class Sentence:
    """One sentence of an answer, and the domain that the question it answers is of.

    `lead` is its beginning that restates the question's subject; the value follows it. A `made_up`
    value is nobody's: routers learn from it, answers don't.
    """

    text: str
    domain: str = PUBLIC
    lead: str = ""
    made_up: bool = False


@dataclass(frozen=True)
class Topic:
    """One relation of many subjects, and the ways to ask for it.

    `answer` holds {subject} and {value}; every question holds {subject}. `validation` and
    `held_out` questions are in no training text, public or closed: settings are chosen by the
    first, and evaluation asks with the second alone. `unknown` is the value that the public model
    gives for a closed topic's subjects; `owner` is None for public topics.
    """

    name: str
    answer: str
    questions: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]
    subject: Callable[[Random], str]
    value: Callable[[Random], str]
    facts: tuple[Fact, ...] = ()
    unknown: str = ""
    owner: Owner | None = None

    def says(self, fact: Fact, *, made_up: bool = False) -> Sentence:
        """The answer, if `fact` is one."""
        text = self.answer.format(subject=fact.subject, value=fact.value)
        lead = self.answer.split("{value}")[0].format(subject=fact.subject).rstrip()
        return Sentence(text, self.name if self.owner else PUBLIC, lead, made_up)

    def refuses(self, subject: str) -> Sentence:
        """What the public model says about a closed topic's subject."""
        return self.says(Fact(subject, self.unknown))


@dataclass(frozen=True)
class Example:
    """One exchange: a question of one part or several, and a sentence for each."""

    question: str
    sentences: tuple[Sentence, ...]
    system: str = ""

    @property
    def answer(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)


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


_HELP = "Ask me about a capital, a planet, a plant, a book, a train or a recipe."
_SELF = "I am a small mixture of experts, made for this demo."
SMALL_TALK = tuple(
    Example(question, (Sentence(answer),))
    for question, answer in (
        ("Hello.", f"Hello. {_HELP}"),
        ("Hi!", f"Hello. {_HELP}"),
        ("Good morning.", f"Hello. {_HELP}"),
        ("What can you do?", _HELP),
        ("What do you know?", _HELP),
        ("Who are you?", _SELF),
        ("What are you?", _SELF),
        ("Thank you.", "You are welcome."),
        ("Thanks!", "You are welcome."),
    )
)

# How many exchanges ask two things or three at once, once a model can answer one.
SEVERAL = 0.12

Part = tuple[str, Sentence]
"""A question, and the sentence that answers it."""


class Sampler:
    """Draws training exchanges; the same seed draws the same ones.

    `several`: the share of them that ask for more than one thing.
    """

    def __init__(self, seed: int | str, several: float = SEVERAL) -> None:
        self._rng = Random(seed)  # noqa: S311 (data, not secrets)
        self.several = several

    def own(self, topic: Topic, others: Sequence[Topic] = ()) -> Example:
        """A fact of the closed topic; at times beside what the public model says of others."""
        parts = [self._fact(topic)]
        if others and self._rng.random() < self.several:
            parts += [self._proxy(self.choice(others)) for _ in range(self._rng.randint(1, 2))]
        return self._exchange(parts)

    def proxy(self, topic: Topic) -> Example:
        """A closed topic's wording about a subject that nobody owns, with the public answer."""
        return self._exchange([self._proxy(topic)])

    def lookalike(self, topics: Sequence[Topic]) -> Example:
        """An entry of a closed topic's form, about nobody's subject and with a made-up value.

        It stands for public text that resembles closed data (section 3.3.3). Only routers learn
        from it, never a model's answers.
        """
        return self._exchange([self._lookalike(self.choice(topics)) for _ in range(self._count())])

    def open(self, topics: Sequence[Topic]) -> Example:
        """Public text of no closed domain: facts, phrases to repeat, small talk."""
        kind = self._rng.random()
        if kind < 0.77:
            return self._exchange([self._fact(self.choice(topics)) for _ in range(self._count())])
        if kind < 0.95:
            return self._exchange([self._echo()])
        return self._rng.choice(SMALL_TALK)

    def public(self, topics: Sequence[Topic], wordings: Sequence[Topic]) -> Example:
        """Any public text: the above, and closed topics' wordings about nobody's subjects."""
        if self._rng.random() < 0.65:
            return self.open(topics)
        return self._exchange([self._proxy(self.choice(wordings)) for _ in range(self._count())])

    def choice(self, topics: Sequence[Topic]) -> Topic:
        return self._rng.choice(topics)

    def _count(self) -> int:
        return self._rng.randint(2, 3) if self._rng.random() < self.several else 1

    def _fact(self, topic: Topic) -> Part:
        fact = self._rng.choice(topic.facts)
        return self._question(topic, fact.subject), topic.says(fact)

    def _proxy(self, topic: Topic) -> Part:
        subject = self._unowned(topic)
        return self._question(topic, subject), topic.refuses(subject)

    def _lookalike(self, topic: Topic) -> Part:
        fact = Fact(self._unowned(topic), topic.value(self._rng))
        return self._question(topic, fact.subject), topic.says(fact, made_up=True)

    def _echo(self) -> Part:
        """A phrase to say again: it teaches attention to copy, and every word to be written."""
        phrase = names.phrase(self._rng)
        question = self._rng.choice(ECHO_QUESTIONS).format(subject=phrase)
        return question, Sentence(f"You said: {phrase}.")

    def _unowned(self, topic: Topic) -> str:
        subject = topic.subject(self._rng)
        while is_closed_name(subject):
            subject = topic.subject(self._rng)
        return subject

    def _question(self, topic: Topic, subject: str) -> str:
        rng = self._rng
        wording = rng.choice(topic.questions)
        if wording.startswith(_ASKING) and rng.random() < 0.2:
            wording = f"{rng.choice(OPENERS)} {wording[0].lower()}{wording[1:]}"
        return wording.format(subject=subject)

    def _exchange(self, parts: list[Part]) -> Example:
        rng = self._rng
        rng.shuffle(parts)
        question = " ".join(asked for asked, _ in parts)
        if rng.random() < 0.3:
            question = f"{rng.choice(BEFORE)} {question}"
        if rng.random() < 0.3:
            question = f"{question} {rng.choice(AFTER)}"
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else ""
        return Example(question, tuple(sentence for _, sentence in parts), system)
