"""What workers counted, against the model that has no other experts."""

from collections.abc import Sequence

import pytest

from expertgate.model.usage import Work
from expertgate.policies.expert_set import ExpertSet
from tests.support.oracle import RowDeletion


def assert_counted(
    work: Work, oracle: RowDeletion, experts: ExpertSet, tokens: Sequence[int], cached: int = 0
) -> None:
    """`work` is that of computing `tokens`, of which the first `cached` were in the prefix cache.

    Slots must be equal. A router's logits may differ by the 2^-13 that those of the vocabulary may,
    and then a softmax weight differs by at most twice that part of itself; so does a sum of them,
    and a share, which divides two, by twice that again.
    """
    assert (work.computed, work.cached) == (len(tokens) - cached, cached)
    slots, weights = oracle.route(experts, tokens, cached)
    assert work.slots == tuple(slots), experts.text
    shares = [weight / sum(weights) for weight in weights]
    for expert, share in enumerate(shares):
        assert work.share(expert) == pytest.approx(share, rel=2**-11), experts.text
        if expert not in experts:
            assert work.slots[expert] == work.weights[expert] == 0
