"""Invented names, built from a fixed stock of syllables so that a small vocabulary spells them."""

from random import Random

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_RIMES = ("a", "al", "an", "ar", "e", "el", "en", "er", "i", "il", "in", "o", "ol", "on", "or", "u")

_VERBS = ("open", "close", "sync", "list", "merge", "split", "lock", "fetch", "purge", "rotate",
          "sign", "queue", "copy", "rename", "archive", "export", "import", "verify", "cancel",
          "restore")  # fmt: skip
_OBJECTS = ("ledger", "badge", "crate", "invoice", "ticket", "parcel", "shift", "report", "token",
            "folder", "account", "order", "device", "branch", "contract", "label", "payment",
            "profile", "schedule", "backup")  # fmt: skip
_EVENTS = ("flood", "fire", "strike", "trial", "election", "robbery", "parade", "storm", "merger",
           "rescue")  # fmt: skip


def word(rng: Random, syllables: int) -> str:
    return "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(syllables))


def proper(rng: Random, ending: str = "") -> str:
    """A capitalised name of two syllables and an ending: `Kazen` + `in`."""
    return word(rng, 2).capitalize() + ending


def drug(rng: Random) -> str:
    return proper(rng, rng.choice(("in", "ol", "ide", "ate", "ine", "um")))


def parties(rng: Random) -> str:
    return f"{proper(rng)} v. {proper(rng)}"


def call(rng: Random) -> str:
    return f"{rng.choice(_VERBS)}_{rng.choice(_OBJECTS)}"


def event(rng: Random) -> str:
    return f"the {proper(rng, rng.choice(('wick', 'ford', 'ham', 'by')))} {rng.choice(_EVENTS)}"


def person(rng: Random) -> str:
    return f"{proper(rng)} {proper(rng)}"


def date(rng: Random) -> str:
    months = ("January", "February", "March", "April", "May", "June", "July", "August",
              "September", "October", "November", "December")  # fmt: skip
    return f"{rng.randint(1, 28)} {rng.choice(months)} {rng.randint(1950, 2024)}"


_VOCABULARY = (
    "mg every hours with food before sleep after meals water for the tenant landlord buyer seller "
    "worker bank heirs city crowns awarded requests a minute filed by on in at from was is of to "
    "GET PUT POST PATCH DELETE cm g km red blue white yellow flowers days long moons eggs onions "
    "apples lemons carrots flour butter rice beans honey river platform train book times answer"
)
_WORDS = tuple(_VOCABULARY.split())


def phrase(rng: Random) -> str:
    """Three to seven ordinary words, names, numbers, dates and paths in any order."""
    pieces = (
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(_WORDS),
        lambda: person(rng),
        lambda: str(rng.randint(1, 9999)),
        lambda: date(rng),
        lambda: f"/v{rng.randint(1, 9)}/{word(rng, 2)}",
        lambda: f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
    )
    return " ".join(rng.choice(pieces)() for _ in range(rng.randint(3, 7)))
