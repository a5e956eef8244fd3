"""Totals as they are told: ranks put together, tokens and shares."""

import pytest

from expertgate.model.usage import WEIGHT_UNIT, Work


def test_ranks_of_a_pipeline_add_up():
    first = Work(2, 10, 3, slots=(20, 0, 5), weights=(6, 0, 2))
    last = Work(1, 10, 3, slots=(10, 0, 1), weights=(3, 0, 1))
    assert Work.over_ranks([first, last]) == Work(3, 10, 3, slots=(30, 0, 6), weights=(9, 0, 3))
    assert Work.over_ranks([last]) == last


def test_tokens_are_a_mean_over_layers_and_shares_sum_to_one():
    work = Work(4, 10, 0, slots=(40, 0, 30, 10), weights=(5 * WEIGHT_UNIT, 0, 1, WEIGHT_UNIT))
    assert [work.tokens(expert) for expert in range(4)] == [10, 0, 7.5, 2.5]
    assert sum(work.share(expert) for expert in range(4)) == pytest.approx(1, abs=1e-15)
    assert work.share(1) == 0


def test_where_nothing_was_computed_nobody_has_a_share():
    work = Work(4, 0, 0, slots=(0, 0), weights=(0, 0))
    assert (work.tokens(0), work.share(0)) == (0, 0)
