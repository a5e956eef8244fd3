"""Names that are one slip away from ours.

A header that nobody knows is let be, as proxies add their own. So a header of ours with one wrong
letter would be passed over: its wish, to leave somebody out, wouldn't be done.
"""

from collections.abc import Iterable

from expertgate.server.errors import bad_request


def refuse_slip(meant: str, headers: Iterable[str]) -> None:
    """Raises ApiError 400 where a header is `meant` but for one letter."""
    wrong = slip(meant, headers)
    if wrong is not None:
        raise bad_request(f"there is no header {wrong}; did you mean {meant}?", meant)


def slip(meant: str, names: Iterable[str]) -> str | None:
    """The first of `names` that is `meant` but for one letter, in whichever case."""
    right = meant.lower()
    near = range(len(right) - 1, len(right) + 2)  # as hardly any of a request's headers is long
    return next((n for n in names if len(n) in near and _is_slip(n.lower(), right)), None)


def _is_slip(name: str, meant: str) -> bool:
    """One letter is missing, too many or another, or two that follow each other are swapped."""
    same = 0
    while same < min(len(name), len(meant)) and name[same] == meant[same]:
        same += 1
    said, right = name[same:], meant[same:]
    return name != meant and (
        said == right[1:]
        or said[1:] == right
        or said[1:] == right[1:]
        or (said[:2] == right[1::-1] and said[2:] == right[2:])
    )
