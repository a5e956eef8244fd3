"""What is asked of every contender: prompts, sets and lengths, from fixed seeds."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from expertgate.policies.expert_set import ExpertSet

_ZIPF = 1.1
_TENANTS = 4


@dataclass(frozen=True)
class Size:
    """How much of everything. Lengths are in tokens; all requests come at once."""

    requests: int = 32
    prompt: int = 64
    output: int = 64
    system: int = 512
    """Of the shared system prompt; several times the engine's block, or nothing is shared."""


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    output_tokens: int
    experts: ExpertSet


@dataclass(frozen=True)
class Workload:
    name: str
    requests: tuple[Request, ...]

    @property
    def sets(self) -> list[ExpertSet]:
        """The distinct ones, most asked for first."""
        counts: dict[ExpertSet, int] = {}
        for request in self.requests:
            counts[request.experts] = counts.get(request.experts, 0) + 1
        return sorted(counts, key=lambda experts: (-counts[experts], experts.mask))


def workloads(num_experts: int, vocabulary: int, size: Size, seed: int) -> list[Workload]:
    tenants = tenant_sets(num_experts)
    weights = [1 / (place + 1) ** _ZIPF for place in range(len(tenants))]

    def make(name: str, choose: Callable[[random.Random], ExpertSet], system: int = 0) -> Workload:
        dice = random.Random(f"{seed}/{name}")
        shared = [dice.randrange(2, vocabulary) for _ in range(system)]
        return Workload(
            name,
            tuple(
                Request(
                    tuple(shared + [dice.randrange(2, vocabulary) for _ in range(size.prompt)]),
                    size.output,
                    choose(dice),
                )
                for _ in range(size.requests)
            ),
        )

    def tenant(dice: random.Random) -> ExpertSet:
        [chosen] = dice.choices(tenants, weights)
        return chosen

    def any_set(dice: random.Random) -> ExpertSet:
        closed = dice.sample(range(1, num_experts), dice.randint(1, num_experts - 1))
        return ExpertSet.of([0, *closed])

    return [
        make("all experts", lambda _: tenants[0]),
        make("public + one", lambda _: tenants[1]),
        make("tenant mix", tenant),
        make("random sets", any_set),
        make("shared prefix", tenant, size.system),
    ]


def tenant_sets(num_experts: int) -> list[ExpertSet]:
    """All, public and one, and two halves that overlap; the first asks most (Zipf)."""
    middle = num_experts // 2
    halves = [range(1, middle + 1), range(middle, num_experts)]
    sets = [ExpertSet.first(num_experts), ExpertSet.first(2)]
    sets += [ExpertSet.of([0, *half]) for half in halves]
    return list(dict.fromkeys(sets))[:_TENANTS]


ABOUT = {
    "all experts": "every request may use all",
    "public + one": "every request has the same set of two",
    "tenant mix": "four tenants with overlapping sets, by Zipf's law (1.1)",
    "random sets": "every request has its own random set, public in each",
    "shared prefix": "the tenant mix behind one long system prompt; prefix cache on",
}
