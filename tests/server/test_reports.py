"""What workers say of calls reaches whoever waits for it, or an error does."""

import asyncio

import pytest

from expertgate.server.reports import Reports


@pytest.mark.parametrize("ranks", [[], [None], [[]], [[[1, 0, 0, [0], [0]]] * 2]])
def test_an_answer_that_does_not_fit_is_an_error_and_the_next_question_is_asked(ranks):
    answers = [ranks, [[[1, 3, 0, [3], [7]]]]]

    async def ask(accounts):
        return answers.pop(0)

    async def story():
        reports = Reports(ask)
        async with asyncio.timeout(60):
            with pytest.raises(RuntimeError, match="asked for 1 calls, told of "):
                await reports.of("first")
            assert (await reports.of("second")).computed == 3

    asyncio.run(story())
