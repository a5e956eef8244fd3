"""The items of a response's input, looked through before vLLM's models read them.

To these an item may be of thirty kinds, and what fits none of them has an error of each: a thousand
items, or a list of annotations, took minutes and all memory. So what passes here fits.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expertgate.server.errors import bad_request
from expertgate.server.limits import check_arguments

Item = Mapping[str, Any]

_TEXTS: Mapping[str, tuple[str, ...]] = {
    "message": ("role",),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
"""The types of item that can be read, and what of each must be text."""
_OTHERS: Mapping[str, tuple[str, ...]] = {
    "message": ("content",),
    "function_call": (),
    "function_call_output": (),
    "reasoning": ("content", "encrypted_content", "summary"),
}
"""What else each may have, besides those that all may."""
NULLS = ("async", "caller", "created_by", "namespace", "phase")
"""What OpenAI's items may say besides; ours have it as null, and may come back so."""
_TEXTS_OR_NULL = ("id", "status", "encrypted_content")
ROLES = ("user", "assistant", "system", "developer")
STATUSES = ("completed", "in_progress", "incomplete")
_REASONED = {"summary": "summary_text", "content": "reasoning_text"}
_UNREAD = ("annotations", "logprobs")
"""What an answer has beside its text. It may come back with it; nobody reads it."""


def check_items(items: Sequence[Item]) -> None:
    """Of objects, whose parts are objects. Raises ApiError 400."""
    for index, item in enumerate(items):
        _check_item(item, f"input[{index}]")


def readable(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items that have been checked, as vLLM reads them: no less than what it asks for."""
    return [dict(_readable(item)) for item in items]


def _readable(item: Item) -> Iterator[tuple[str, Any]]:
    kind = item.get("type", "message")
    yield "type", kind
    # Where a message isn't an answer's, vLLM takes it for one by these; it makes an id of its own.
    left_out = ("id", "status") if isinstance(item.get("content"), str) else ("id",)
    for name, value in item.items():
        if value is None or name == "type" or (kind == "message" and name in left_out):
            continue
        if name == "content" and isinstance(value, list):
            value = [{n: v for n, v in part.items() if n not in _UNREAD} for part in value]
        yield name, value


def _check_item(item: Item, place: str) -> None:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _TEXTS:
        hint = "; nothing is stored here: send the item itself" if kind == "item_reference" else ""
        words = f"{place}.type must be one of {', '.join(_TEXTS)}{hint}"
        raise bad_request(words, f"{place}.type")
    known = (*_TEXTS[kind], *_OTHERS[kind], "id", "status", "type")
    for name, value in item.items():
        if name not in known and value is not None:
            raise bad_request(f"{place}.{name}: a {kind} has no such field", f"{place}.{name}")
    for name in (*_TEXTS[kind], *_TEXTS_OR_NULL):
        value = item.get(name)
        if not isinstance(value, str) and (value is not None or name in _TEXTS[kind]):
            raise bad_request(f"{place}.{name} must be text", f"{place}.{name}")
    _check_one_of(item.get("status"), STATUSES, f"{place}.status")
    if kind == "function_call":
        check_arguments(item["arguments"], f"{place}.arguments")
    if kind == "message":
        _check_one_of(item["role"], ROLES, f"{place}.role")
        _check_content(item, f"{place}.content")
    if kind == "reasoning":
        if not isinstance(item.get("summary"), list):
            raise bad_request(f"{place}.summary must be a list", f"{place}.summary")
        for name, wanted in _REASONED.items():
            value = item.get(name)
            if not isinstance(value, list | None):
                raise bad_request(f"{place}.{name} must be a list", f"{place}.{name}")
            _check_parts(value or [], wanted, f"{place}.{name}")


def _check_content(item: Item, place: str) -> None:
    content = item.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise bad_request(f"{place} must be text, or a list of parts of text", place)
    own = item["role"] == "assistant"
    _check_parts(content, "output_text" if own else "input_text", place)
    for index, part in enumerate(content):
        for name in _UNREAD:
            where = f"{place}[{index}].{name}"
            if name in part and not own:
                raise bad_request(f"{where}: only an assistant's part may have that", where)
            if not isinstance(part.get(name), list | None):
                raise bad_request(f"{where} must be a list", where)
    if own and len(content) > 1:
        # vLLM would read the first, and silently leave out the others.
        raise bad_request(f"{place}: a message of the assistant may have one part", place)


def _check_parts(parts: Sequence[Item], wanted: str, place: str) -> None:
    for index, part in enumerate(parts):
        where = f"{place}[{index}]"
        if part.get("type") != wanted:
            raise bad_request(f"{where}: only parts of type {wanted!r} can be read here", where)
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{where}.text must be text", f"{where}.text")


def _check_one_of(value: str | None, known: Sequence[str], place: str) -> None:
    if value is not None and value not in known:
        raise bad_request(f"{place} must be {', '.join(known[:-1])} or {known[-1]}", place)
