"""A frozen set of expert indices, held as a 64-bit mask."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_EXPERTS = 64
PUBLIC = 0


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """Bit e of `mask` is set where expert e is in the set; index 0 is the public expert.

    Raises ValueError for a mask of more than 64 bits.
    """

    mask: int

    def __post_init__(self) -> None:
        if not 0 <= self.mask < 1 << MAX_EXPERTS:
            raise ValueError(f"an expert set is a mask of {MAX_EXPERTS} bits, not {self.mask:#x}")

    @classmethod
    def of(cls, indices: Iterable[int]) -> "ExpertSet":
        """Raises ValueError for an index outside of 0..63."""
        mask = 0
        for index in indices:
            if not 0 <= index < MAX_EXPERTS:
                raise ValueError(f"expert index {index} is outside 0..{MAX_EXPERTS - 1}")
            mask |= 1 << index
        return cls(mask)

    @classmethod
    def first(cls, count: int) -> "ExpertSet":
        """All experts of a checkpoint that has `count` of them."""
        return cls.of(range(count))

    def __contains__(self, index: int) -> bool:
        return bool(self.mask >> index & 1)

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(self.mask.bit_length()) if index in self)

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __le__(self, other: "ExpertSet") -> bool:
        return not self.mask & ~other.mask

    def __and__(self, other: "ExpertSet") -> "ExpertSet":
        return ExpertSet(self.mask & other.mask)

    def __or__(self, other: "ExpertSet") -> "ExpertSet":
        return ExpertSet(self.mask | other.mask)

    def __sub__(self, other: "ExpertSet") -> "ExpertSet":
        return ExpertSet(self.mask & ~other.mask)

    @property
    def signed(self) -> int:
        """The mask as the two's complement that an int64 tensor holds."""
        return self.mask - (1 << MAX_EXPERTS) if self.mask >> (MAX_EXPERTS - 1) else self.mask

    @property
    def text(self) -> str:
        """The canonical text: indices in order, joined by commas."""
        return ",".join(map(str, self))

    @property
    def digest(self) -> bytes:
        """32 bytes that name this set and no other."""
        return hashlib.sha256(b"expertgate/expert-set/1:" + self.text.encode()).digest()


PUBLIC_ONLY = ExpertSet.of([PUBLIC])
