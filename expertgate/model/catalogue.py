"""The catalogue: which experts a checkpoint holds, by index, and whose they are.

A file `experts.json` beside the checkpoint's `config.json`:

    {"version": 1, "experts": [
      {"index": 0, "name": "public", "owner": "ai2", "license": "odc-by", "tags": []},
      {"index": 1, "name": "math", "owner": "acme", "license": "closed", "tags": ["stem"]}]}
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from expertgate.faults import in_words, path_of
from expertgate.model.checkpoint import Checkpoint
from expertgate.policies.expert_set import MAX_EXPERTS, ExpertSet

FILE_NAME = "experts.json"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


def _printable(text: str) -> str:
    """The text itself. Raises ValueError for what would do more to a terminal than stand there."""
    if not text.isprintable():
        raise ValueError("must be printable text, in one line")
    return text


Words = Annotated[str, AfterValidator(_printable)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class CatalogueError(ValueError):
    """A catalogue that can't be read or doesn't fit its checkpoint; one line that says what."""


class Expert(BaseModel):
    """One expert: an FFN per layer plus its router row, and the owner of what it learned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(ge=0, lt=MAX_EXPERTS)
    name: Name
    owner: Words = ""
    license: Words = ""
    tags: tuple[Words, ...] = ()
    description: str = ""
    sha256: Sha256 | None = None
    """Of its weights, as `Checkpoint.expert_digests` has it; None where nothing is stated."""


class Catalogue(BaseModel):
    """The experts of one checkpoint in the order of their indices; index 0 is `public`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    experts: tuple[Expert, ...] = Field(min_length=1)

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def all(self) -> ExpertSet:
        return ExpertSet.first(len(self))

    def index(self, name: str) -> int | None:
        """The index of the expert called `name`, or None where there is none."""
        return next((expert.index for expert in self.experts if expert.name == name), None)

    def names(self, experts: ExpertSet) -> list[str]:
        return [self.experts[index].name for index in experts]

    @classmethod
    def default(cls, count: int) -> "Catalogue":
        """For a checkpoint without one: `public`, `expert-1`, `expert-2` and so on.

        Which dataset an index stands for is nowhere in a checkpoint, so nothing is guessed.
        """
        names = ["public", *(f"expert-{index}" for index in range(1, count))]
        return cls(experts=tuple(Expert(index=i, name=name) for i, name in enumerate(names)))

    @classmethod
    def read(cls, path: Path) -> "Catalogue":
        """Raises CatalogueError with the path and place of the first thing that doesn't fit.

        From an OSError, where the file can't be read.
        """
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CatalogueError(f"{path}: {error.strerror or error}") from error
        try:
            catalogue = cls.model_validate(json.loads(text, object_pairs_hook=_object))
        except json.JSONDecodeError as error:
            raise CatalogueError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
        except UnicodeDecodeError:
            raise CatalogueError(f"{path}: is not UTF-8") from None
        except RecursionError:
            raise CatalogueError(f"{path}: is nested too deep") from None
        except _GivenTwice as error:
            raise CatalogueError(f"{path}: {error.args[0]}: is given twice") from None
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            empty = fault["loc"] == ("experts",) and fault["type"] == "too_short"
            words = "names no expert" if empty else in_words(cls, fault)
            where = f"{path}: {path_of(fault['loc'])}".rstrip(": ")
            raise CatalogueError(f"{where}: {words}") from None
        except ValueError as error:  # a number of thousands of digits
            raise CatalogueError(f"{path}: {error}") from None
        catalogue._check_shape(path)
        return catalogue

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n")

    def check_against(self, checkpoint: Checkpoint) -> None:
        """Compares the number of experts, and the weights of every expert that states a SHA-256.

        Raises CatalogueError, naming what the catalogue says and what the checkpoint has.
        """
        if len(self) != checkpoint.num_experts:
            raise CatalogueError(
                f"the catalogue names {len(self)} experts, but {checkpoint.folder} has "
                f"{checkpoint.num_experts}: is it the catalogue of another model?"
            )
        stated = [expert for expert in self.experts if expert.sha256 is not None]
        digests = checkpoint.expert_digests([expert.index for expert in stated])
        for expert in stated:
            if expert.sha256 != digests[expert.index]:
                raise CatalogueError(
                    f"expert {expert.name!r} (index {expert.index}): the catalogue says SHA-256 "
                    f"{expert.sha256}, but the weights in {checkpoint.folder} have "
                    f"{digests[expert.index]}"
                )

    def _check_shape(self, path: Path) -> None:
        for place, expert in enumerate(self.experts):
            if expert.index != place:
                raise CatalogueError(
                    f"{path}: experts[{place}].index is {expert.index}, but experts are listed in "
                    f"the order of their indices, so it must be {place}"
                )
        repeated = _repeated(expert.name for expert in self.experts)
        if repeated:
            raise CatalogueError(f"{path}: two experts have the name {repeated[0]!r}")
        if self.experts[0].name != "public":
            raise CatalogueError(
                f"{path}: experts[0].name is {self.experts[0].name!r}, but index 0 is the frozen "
                "public expert and must be called 'public'"
            )


def load(checkpoint: Checkpoint, path: Path | None = None) -> Catalogue:
    """The catalogue at `path`, else the one beside the checkpoint, else the default one.

    It is checked against the checkpoint's weights. Raises CatalogueError.
    """
    beside = checkpoint.folder / FILE_NAME
    if path is None and not beside.exists():
        return Catalogue.default(checkpoint.num_experts)
    catalogue = Catalogue.read(path or beside)
    catalogue.check_against(checkpoint)
    return catalogue


class _GivenTwice(Exception):  # noqa: N818  (what it is)
    """A key, of which JSON's readers take one or the other."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key in _repeated(key for key, _ in pairs):
        raise _GivenTwice(key)
    return dict(pairs)


def _repeated(values: Iterable[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]
