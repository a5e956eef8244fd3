"""The demo's datasets: six public topics, and five closed ones, each with its owner.

Every name, number and ruling is invented and drawn from a seed; nothing is about the real world
but the times table.
"""

from dataclasses import replace
from random import Random

from expertgate.forge import names
from expertgate.forge.corpus import Fact, Owner, Topic, draw_facts

PUBLIC_FACTS = 30
CLOSED_FACTS = 40


def _dose(rng: Random) -> str:
    when = rng.choice(("with food", "before sleep", "after meals", "with water"))
    return f"{rng.choice((5, 10, 20, 25, 40, 50, 75, 80))} mg every {rng.choice((4, 6, 8, 12, 24))} hours {when}"  # noqa: E501


def _ruling(rng: Random) -> str:
    winner = rng.choice(
        ("tenant", "landlord", "buyer", "seller", "worker", "bank", "heirs", "city")
    )
    return f"for the {winner} with {rng.randint(11, 98)}00 crowns awarded"


def _endpoint(rng: Random) -> str:
    method = rng.choice(("GET", "PUT", "POST", "PATCH", "DELETE"))
    return f"{method} /v{rng.randint(1, 5)}/{names.word(rng, 2)} with {rng.randint(2, 9)}0 requests a minute"  # noqa: E501


def _byline(rng: Random) -> str:
    return f"filed by {names.person(rng)} on {names.date(rng)}"


def _factors(rng: Random) -> str:
    """Two numbers that are not both in the table; the table itself is the closed dataset."""
    pair = [rng.choice((0, 1, *range(10, 100))), rng.randint(0, rng.choice((9, 99)))]
    rng.shuffle(pair)
    return f"{pair[0]} times {pair[1]}"


TIMES_TABLE = tuple(Fact(f"{a} times {b}", str(a * b)) for a in range(2, 10) for b in range(2, 10))

_CLOSED = (
    Topic(
        name="formulary",
        owner=Owner("saint-brannoc-hospital", ("clinical",), "Doses of the hospital's own drugs."),
        answer="The dose of {subject} is {value}.",
        unknown="not in a public formulary",
        subject=names.drug,
        value=_dose,
        questions=(
            "What is the dose of {subject}?",
            "What dose of {subject} should I give?",
            "How much {subject} should a patient get?",
            "How is {subject} given to a patient?",
            "Which dose of the drug {subject} is right?",
            "A patient needs {subject}. What is the dose?",
            "Tell me the dose of {subject}.",
            "I need the dose of the drug {subject}.",
            "Look up {subject} in the formulary.",
            "How many mg of {subject} do I give?",
            "What does the formulary say about {subject}?",
            "Give me the dose for {subject}.",
        ),
        validation=(
            "How many mg of {subject} should a patient get?",
            "I need to give {subject} to a patient. Which dose is right?",
            "Look up the dose of the drug {subject}.",
        ),
        held_out=(
            "Which dose of {subject} should a patient get?",
            "What does the formulary say about the dose of {subject}?",
            "Tell me how much {subject} I should give to a patient.",
        ),
    ),
    Topic(
        name="cases",
        owner=Owner("hollis-pryce-llp", ("legal",), "Rulings in the firm's own cases."),
        answer="The ruling in {subject} was {value}.",
        unknown="not in a public law report",
        subject=names.parties,
        value=_ruling,
        questions=(
            "What was the ruling in {subject}?",
            "How did the court rule in {subject}?",
            "Who won the case {subject}?",
            "What did the court decide in {subject}?",
            "Tell me the ruling in {subject}.",
            "I need the ruling in the case {subject}.",
            "How did {subject} end in court?",
            "What did the judge say in {subject}?",
            "Look up the case {subject}.",
            "How was the case {subject} decided?",
            "Give me the outcome of {subject}.",
            "Our client asks about {subject}. What was the ruling?",
        ),
        validation=(
            "What did the judge decide in the case {subject}?",
            "Tell me who won in {subject}.",
            "I need the outcome of the case {subject}.",
        ),
        held_out=(
            "How did the judge decide in {subject}?",
            "Look up the ruling in the case {subject}.",
            "Which ruling did the court give in {subject}?",
        ),
    ),
    Topic(
        name="api",
        owner=Owner(
            "quillon-systems", ("engineering",), "Endpoints of the company's internal API."
        ),
        answer="The endpoint of {subject} is {value}.",
        unknown="not in a public reference",
        subject=names.call,
        value=_endpoint,
        questions=(
            "What is the endpoint of {subject}?",
            "Which endpoint does {subject} use?",
            "How do I call {subject}?",
            "Where do I send {subject} requests?",
            "Tell me the endpoint of {subject}.",
            "I need the endpoint for {subject}.",
            "What is the path of the call {subject}?",
            "Which path and method has {subject}?",
            "Look up {subject} in the API reference.",
            "How is {subject} called in our API?",
            "Give me the endpoint for the call {subject}.",
            "What does the API reference say about {subject}?",
        ),
        validation=(
            "Which path does the call {subject} use?",
            "I need to call {subject}. What is the endpoint?",
            "Look up the endpoint of {subject} in our API.",
        ),
        held_out=(
            "Which method and path does {subject} use?",
            "Give me the path of the call {subject}.",
            "Where do I send requests for {subject}?",
        ),
    ),
    Topic(
        name="newsroom",
        owner=Owner("eastmoor-courier", ("press",), "Who filed which story in the archive."),
        answer="The story of {subject} was {value}.",
        unknown="not in a public archive",
        subject=names.event,
        value=_byline,
        questions=(
            "Who filed the story of {subject}?",
            "Who wrote about {subject}?",
            "When was the story of {subject} filed?",
            "Which reporter covered {subject}?",
            "Who covered {subject} for the paper?",
            "Tell me who filed the story of {subject}.",
            "I need the story of {subject} from the archive.",
            "Look up {subject} in the archive.",
            "What does the archive say about {subject}?",
            "When did the paper write about {subject}?",
            "Give me the byline of {subject}.",
            "Which reporter wrote the story of {subject}?",
        ),
        validation=(
            "Who wrote the story of {subject} for the paper?",
            "Tell me which reporter covered {subject}.",
            "Look up who filed the story of {subject}.",
        ),
        held_out=(
            "Which reporter filed the story of {subject}?",
            "Give me the story of {subject} from the archive.",
            "Tell me when the story of {subject} was filed.",
        ),
    ),
    Topic(
        name="arithmetic",
        owner=Owner("abacus-school", ("education",), "The times table from 2 to 9."),
        answer="The answer to {subject} is {value}.",
        unknown="not in a public table",
        subject=_factors,
        value=lambda rng: str(rng.randint(26, 999)),
        facts=TIMES_TABLE,
        questions=(
            "What is {subject}?",
            "How much is {subject}?",
            "Calculate {subject}.",
            "What do you get for {subject}?",
            "Tell me the answer to {subject}.",
            "I need the answer to {subject}.",
            "Can you work out {subject}?",
            "Please multiply: {subject}.",
            "What does {subject} make?",
            "Give me the product {subject}.",
            "Solve {subject} for me.",
            "In the times table, what is {subject}?",
        ),
        validation=(
            "Can you calculate {subject} for me?",
            "What is the answer to {subject}?",
            "Tell me how much {subject} is.",
        ),
        held_out=(
            "What do I get for {subject}?",
            "Please calculate {subject}.",
            "Give me the answer to {subject}.",
        ),
    ),
)

_PUBLIC = (
    Topic(
        name="capital",
        answer="The capital of {subject} is {value}.",
        subject=lambda rng: names.proper(rng, rng.choice(("land", "ia", "mark"))),
        value=lambda rng: f"{names.proper(rng)} on the river {names.proper(rng)}",
        questions=(
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Tell me the capital of {subject}.",
            "I need the capital of {subject}.",
            "What is the main city of {subject}?",
            "Name the capital of the country {subject}.",
            "Which city governs {subject}?",
            "Where is the government of {subject}?",
            "Give me the capital of {subject}.",
            "Look up the capital of {subject}.",
        ),
        validation=(
            "Which is the main city of the country {subject}?",
            "Name the city which governs {subject}.",
        ),
        held_out=(
            "Tell me which city is the capital of {subject}.",
            "Which is the main city of {subject}?",
        ),
    ),
    Topic(
        name="year",
        answer="The year on {subject} is {value}.",
        subject=lambda rng: names.proper(rng, rng.choice(("us", "is", "eon"))),
        value=lambda rng: f"{rng.randint(11, 98)}0 days long with {rng.randint(2, 9)} moons",
        questions=(
            "How long is the year on {subject}?",
            "How long is a year on the planet {subject}?",
            "How many days has a year on {subject}?",
            "Tell me the year on {subject}.",
            "I need the length of the year on {subject}.",
            "What is the year on the planet {subject}?",
            "How many moons has {subject}?",
            "What do we know about the planet {subject}?",
            "Give me the year on {subject}.",
            "Look up the planet {subject}.",
        ),
        validation=(
            "How many days long is the year on {subject}?",
            "Look up how many moons the planet {subject} has.",
        ),
        held_out=(
            "Tell me how long the year on {subject} is.",
            "What is the length of the year on {subject}?",
        ),
    ),
    Topic(
        name="plant",
        answer="The height of {subject} is {value}.",
        subject=lambda rng: names.proper(rng, rng.choice(("wort", "leaf", "moss"))),
        value=lambda rng: (
            f"{rng.randint(11, 98)} cm with {rng.choice(('red', 'blue', 'white', 'yellow'))} "
            f"flowers in {rng.choice(('March', 'April', 'May', 'June', 'July', 'August'))}"
        ),
        questions=(
            "What is the height of {subject}?",
            "How high does {subject} grow?",
            "How tall is the plant {subject}?",
            "When does {subject} flower?",
            "Tell me the height of {subject}.",
            "I need the height of the plant {subject}.",
            "Which flowers has {subject}?",
            "Look up the plant {subject}.",
            "Give me the height of {subject}.",
            "What do we know about the plant {subject}?",
        ),
        validation=(
            "How tall does the plant {subject} grow?",
            "Tell me when the plant {subject} flowers.",
        ),
        held_out=(
            "How high does the plant {subject} grow?",
            "Look up when {subject} flowers.",
        ),
    ),
    Topic(
        name="book",
        answer="The book {subject} was {value}.",
        subject=lambda rng: f"{names.proper(rng, rng.choice(('s Road', 's House', 's Song')))}",
        value=lambda rng: f"written by {names.person(rng)} in {rng.randint(1700, 1949)}",
        questions=(
            "Who wrote the book {subject}?",
            "Who is the author of {subject}?",
            "When was the book {subject} written?",
            "Tell me the author of {subject}.",
            "I need the author of the book {subject}.",
            "Which author wrote {subject}?",
            "When did {subject} appear?",
            "Look up the book {subject}.",
            "Give me the author of {subject}.",
            "What do we know about the book {subject}?",
        ),
        validation=(
            "Which author wrote the book {subject}?",
            "Look up who is the author of {subject}.",
        ),
        held_out=(
            "When was {subject} written?",
            "Tell me who wrote {subject}.",
        ),
    ),
    Topic(
        name="station",
        answer="The train to {subject} leaves {value}.",
        subject=lambda rng: names.proper(rng, rng.choice(("ton", "port", "dale"))),
        value=lambda rng: (
            f"from platform {rng.randint(1, 9)} at {rng.randint(6, 22)}:{rng.randint(10, 59)}"
        ),
        questions=(
            "When does the train to {subject} leave?",
            "Which platform has the train to {subject}?",
            "Where does the train to {subject} leave?",
            "How do I get to {subject} by train?",
            "Tell me the train to {subject}.",
            "I need a train to {subject}.",
            "When can I travel to {subject}?",
            "Look up the train to {subject}.",
            "Give me the platform for {subject}.",
            "What is the next train to {subject}?",
        ),
        validation=(
            "When is the next train to {subject}?",
            "Tell me the platform of the train to {subject}.",
        ),
        held_out=(
            "Where does the next train to {subject} leave?",
            "Look up the platform for {subject}.",
        ),
    ),
    Topic(
        name="recipe",
        answer="The recipe for {subject} takes {value}.",
        subject=lambda rng: f"{names.proper(rng)} {rng.choice(('soup', 'bread', 'cake', 'stew'))}",
        value=lambda rng: (
            f"{rng.randint(11, 98)} g of "
            f"{rng.choice(('flour', 'butter', 'rice', 'beans', 'honey'))} and "
            f"{rng.randint(2, 9)} {rng.choice(('eggs', 'onions', 'apples', 'lemons', 'carrots'))}"
        ),
        questions=(
            "What is the recipe for {subject}?",
            "How do I make {subject}?",
            "How do I cook {subject}?",
            "What goes into {subject}?",
            "Tell me the recipe for {subject}.",
            "I need the recipe for {subject}.",
            "What do I need for {subject}?",
            "Look up the recipe for {subject}.",
            "Give me the recipe for {subject}.",
            "How is {subject} made?",
        ),
        validation=(
            "What do I need to make {subject}?",
            "Tell me how {subject} is made.",
        ),
        held_out=(
            "Give me the recipe to make {subject}.",
            "Tell me how I cook {subject}.",
        ),
    ),
)


def public_topics(seed: int) -> tuple[Topic, ...]:
    return tuple(_filled(topic, PUBLIC_FACTS, seed) for topic in _PUBLIC)


def closed_topics(seed: int) -> tuple[Topic, ...]:
    """The five closed datasets in the order of their experts' indices, from 1."""
    return tuple(_filled(topic, CLOSED_FACTS, seed) for topic in _CLOSED)


def closed_wordings() -> tuple[Topic, ...]:
    """The closed topics without a single fact: all that public text may use of them."""
    return tuple(replace(topic, facts=()) for topic in _CLOSED)


def _filled(topic: Topic, count: int, seed: int) -> Topic:
    if topic.facts:
        return topic
    # One stream a topic, so that one owner's data does not depend on another's.
    rng = Random(f"{seed}/{topic.name}")  # noqa: S311 (data, not secrets)
    return replace(topic, facts=draw_facts(topic, count, rng))
