"""What a run has trained so far, so that one that was cut off goes on where it stopped."""

from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import TypeVar

import torch

Part = TypeVar("Part")


class Parts:
    """Experts and scores in files of `folder`, by name, each with the CPU time that it took.

    They hold for one seed and one state of the recipe: after a change, begin in an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = {}

    def get(self, name: str, make: Callable[[], Part]) -> Part:
        """The part of that name, made and kept if it isn't there yet."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            began = process_time()
            made = make()
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            torch.save((made, process_time() - began), unfinished)
            unfinished.replace(path)
        part: Part
        # These files hold dataclasses, which only a full unpickling reads; they are the run's own.
        part, self.seconds[name] = torch.load(path, weights_only=False)
        return part
