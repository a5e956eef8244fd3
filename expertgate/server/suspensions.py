"""The experts that are suspended: taken from everybody at once, and after a restart still.

    # suspended.yaml
    - news

There is no such file until something is suspended. Once a server has read one, a file that is
broken or gone changes nothing; at the start, a broken one ends the start.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from expertgate.model.catalogue import Name
from expertgate.server.file_edit import locked, replace
from expertgate.server.plain_file import check_plain
from expertgate.server.yaml_file import YamlError, YamlFile


class SuspensionError(ValueError):
    """A file of suspensions that can't be read or written: one fault a line, with its place."""


def read(path: Path) -> frozenset[str] | None:
    """The names in the file; None where there is no file.

    Raises SuspensionError, from an OSError where the file can't be read.
    """
    try:
        check_plain(path)
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SuspensionError(f"{path}: {error.strerror or error}") from error
    try:
        file = YamlFile.parse(raw, path)
        if file.value is None:
            # Perhaps half of what somebody is writing.
            raise file.fault((), "is empty; write [] where nothing is suspended")
        return frozenset(file.validate(list[Name]))
    except YamlError as error:
        raise SuspensionError(str(error)) from None


def suspend(path: Path, expert: str, held: frozenset[str] = frozenset()) -> bool:
    """Adds an expert to the file; False where it was there. Raises SuspensionError.

    `held`: what is suspended all the same where there is no file.
    """
    return _change(path, held, lambda names: names | {expert})


def resume(path: Path, expert: str, held: frozenset[str] = frozenset()) -> bool:
    """Takes an expert out of the file; False where it was not there. Raises SuspensionError.

    `held`: as for `suspend`.
    """
    return _change(path, held, lambda names: names - {expert})


def _change(
    path: Path, held: frozenset[str], change: Callable[[frozenset[str]], frozenset[str]]
) -> bool:
    """At every moment the file is the old or the new one, and of two writers neither is lost."""
    try:
        with locked(path) as target:
            found = read(target)
            old = held if found is None else found
            new = change(old)
            if new != found and (new or old):  # else there may go on being none
                # Readable by a server of another user's, who else would not obey.
                replace(target, yaml.safe_dump(sorted(new)).encode(), 0o644)
    except OSError as error:
        raise SuspensionError(f"{path}: {error.strerror or error}") from None
    return new != old
