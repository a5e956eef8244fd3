"""Which experts a request asks for, and whether they lie inside its grant.

A request can say it in three places; where it does so in several, they must say the same.

| place | exactly these | all that are granted but these |
| --- | --- | --- |
| body field `experts` | `["public", "math"]` | `{"exclude": ["news"]}` |
| header `X-Experts` | `public, math` | `-news, -math` |
| model alias | `NAME:public+math` | `NAME:-news+-math` |

Said nowhere, it means all that are granted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers

from expertgate.model.catalogue import Catalogue
from expertgate.policies.expert_set import MAX_EXPERTS, ExpertSet
from expertgate.server.errors import ApiError
from expertgate.server.slips import slip

HEADER = "X-Experts"

_MAX_NAME_CHARS = 63
_OWS = " \t"
"""What may surround an element of a header's list (RFC 9110, §5.6.3)."""
_SHOWN_NAMES = 8
_LIKE_OURS, _OTHERS = "x-expert", "x-expertgate"
"""How a header begins that was meant to be ours, and how one that somebody else may well send."""


class _Exclude(Protocol):
    @property
    def exclude(self) -> list[str]: ...


class Asking(Protocol):
    """What this module reads of a request's body, once its schema has seen to the types."""

    @property
    def model(self) -> str | None: ...

    @property
    def experts(self) -> "list[str] | _Exclude | None": ...


@dataclass(frozen=True, slots=True)
class Selection:
    """Exactly the experts of these names, or, where `exclude` is set, all that are granted but."""

    names: frozenset[str]
    exclude: bool = False


def select(body: Asking, headers: Headers, served: str) -> Selection | None:
    """What the request asks for; None means all that are granted. `served` is the model's name.

    Raises ApiError: 404 `model_not_found` for another model, 400 `invalid_experts` for what is
    malformed, empty, or said differently in two places, or in a header that is almost ours.
    """
    _refuse_misspelt(headers)
    said = {
        "experts": from_body(body.experts),
        f"header {HEADER}": from_header(headers.getlist(HEADER)),
        "model": from_model(body.model, served),
    }
    given = {place: selection for place, selection in said.items() if selection is not None}
    if len(set(given.values())) > 1:
        raise _invalid(f"{' and '.join(given)} ask for different experts; say it once, or alike")
    return next(iter(given.values()), None)


def from_body(experts: list[str] | _Exclude | None) -> Selection | None:
    """Of the body's field. An empty `exclude` leaves out nobody. Raises ApiError 400."""
    if experts is None:
        return None
    if isinstance(experts, list):
        return _selection(experts, "experts", exclude=False)
    return _selection(experts.exclude, "experts.exclude", exclude=True)


def from_header(lines: Sequence[str]) -> Selection | None:
    """Of the header's lines, which together are one list (RFC 9110, §5.3). Raises ApiError 400."""
    if not lines:
        return None
    elements = [element.strip(_OWS) for element in ",".join(lines).split(",")]
    # A recipient ignores empty elements (RFC 9110, §5.6.1.2).
    return _signed([element for element in elements if element], f"header {HEADER}")


def from_model(model: str | None, served: str) -> Selection | None:
    """Of the model's name, which is `served` or an alias of it.

    Raises ApiError: 404 for another model, 400 for a malformed alias.
    """
    if model is None or model == served:
        return None
    name, alias = model[: len(served) + 1], model[len(served) + 1 :]
    if name != f"{served}:":
        raise ApiError(
            404,
            "model_not_found",
            f"there is no model {_shown(model)}; this server has {_shown(served)}",
            "model",
        )
    return _signed(alias.split("+"), "model")


def _refuse_misspelt(headers: Headers) -> None:
    """A wish that nobody reads would be answered by all experts. Raises ApiError 400."""
    names = [name for name in headers if name != HEADER.lower()]
    wrong = slip(HEADER, names) or next(
        (n for n in names if n.startswith(_LIKE_OURS) and not n.startswith(_OTHERS)), None
    )
    if wrong is not None:
        raise _invalid(f"there is no header {_shown(wrong)}; experts are named in {HEADER}")


def effective(selection: Selection | None, granted: ExpertSet, catalogue: Catalogue) -> ExpertSet:
    """The experts that may speak: a set inside `granted`, and never an empty one.

    Raises ApiError: 403 `expert_not_permitted` where nothing is granted, or a name, asked for or
    excluded, is outside the grant; 400 `invalid_experts` where nobody is left.
    """
    if not granted:
        raise ApiError(403, "expert_not_permitted", "no expert is granted to you", "experts")
    if selection is None:
        return granted
    # Only the grant is searched, so that a forbidden expert and one that doesn't exist take the
    # same way and look alike.
    index_of = {catalogue.experts[index].name: index for index in granted}
    outside = sorted(selection.names - index_of.keys())
    if outside:
        names = ", ".join(map(_shown, outside[:_SHOWN_NAMES]))
        more = f" and {len(outside) - _SHOWN_NAMES} more" if len(outside) > _SHOWN_NAMES else ""
        raise ApiError(403, "expert_not_permitted", f"not granted to you: {names}{more}", "experts")
    named = ExpertSet.of(index_of[name] for name in selection.names)
    if not selection.exclude:
        return named
    if not granted - named:
        raise _invalid("every expert that is granted to you is excluded; leave at least one")
    return granted - named


def _signed(entries: Sequence[str], place: str) -> Selection:
    """Entries that all begin with `-`, or none of them."""
    signs = {entry.startswith("-") for entry in entries}
    if len(signs) > 1:
        raise _invalid(f"{place}: either every name has a '-' in front, or none has")
    exclude = signs == {True}
    return _selection([entry[exclude:] for entry in entries], place, exclude=exclude)


def _selection(names: Sequence[str], place: str, *, exclude: bool) -> Selection:
    if not names and place != "experts.exclude":
        raise _invalid(f"{place}: names no expert; name at least one, or leave it out")
    if len(names) > MAX_EXPERTS:
        raise _invalid(f"{place}: has {len(names)} names; at most {MAX_EXPERTS}")
    for name in names:
        if not 1 <= len(name) <= _MAX_NAME_CHARS:
            raise _invalid(
                f"{place}: a name has 1 to {_MAX_NAME_CHARS} characters, not {len(name)}"
            )
    return Selection(frozenset(names), exclude)


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_experts", message, "experts")


def _shown(name: str) -> str:
    """A client's own words, as short and plain ASCII."""
    return json.dumps(name if len(name) <= _MAX_NAME_CHARS else name[:_MAX_NAME_CHARS] + "…")
