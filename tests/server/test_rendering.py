"""A single prompt takes no turn of the event loop that it doesn't need; several are gathered."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.renderers import base

from expertgate.server.rendering import gather, render_in_place


@pytest.fixture
def in_place():
    before = base.asyncio
    render_in_place()
    yield
    base.asyncio = before


@pytest.fixture
def stock():
    before, base.asyncio = base.asyncio, asyncio
    yield
    base.asyncio = before


async def render(prompts, tok_params=None):
    """vLLM's own rendering of prompts that are tokens already; the tasks in which it went on."""
    tasks = []

    async def step(prompt, *_, **__):
        tasks.append(asyncio.current_task())
        return prompt

    renderer = SimpleNamespace(
        _render_prompt_async=step, tokenize_prompt_async=step, process_for_engine_async=step,
        _apply_prompt_extras=lambda *_: None,
    )  # fmt: skip
    for name in ("render_prompts_async", "tokenize_prompts_async"):
        setattr(renderer, name, getattr(base.BaseRenderer, name).__get__(renderer))
    rendered = await base.BaseRenderer.render_cmpl_async(renderer, prompts, tok_params or object())
    return rendered, tasks


def test_vllm_renders_one_prompt_in_the_requests_own_task(in_place):
    async def run():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        rendered, tasks = await render(["one"])
        counting.cancel()
        assert rendered == ["one"]
        assert tasks == [asyncio.current_task()] * 3
        assert turns == 0

    asyncio.run(run())


def test_vllm_still_gathers_several(in_place):
    async def run():
        rendered, tasks = await render(["one", "two"])
        assert rendered == ["one", "two"]
        assert len(set(tasks)) == 6

    asyncio.run(run())


def test_without_it_vllm_makes_tasks_of_one(stock):
    """Or there is nothing left to do here."""

    async def run():
        _, tasks = await render(["one"])
        assert asyncio.current_task() not in tasks

    asyncio.run(run())


def test_what_fails_is_raised():
    async def run():
        async def fail():
            raise ValueError("a prompt")

        with pytest.raises(ValueError, match="a prompt"):
            await gather(fail())
        with pytest.raises(ValueError, match="a prompt"):
            await gather(fail(), asyncio.sleep(0))

    asyncio.run(run())


def test_being_called_off_is_not_lost_in_what_swallows_it():
    async def run():
        async def swallow():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return "rendered"

        for others in ((), (asyncio.sleep(0),)):
            asking = asyncio.create_task(gather(swallow(), *others))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(run())


def test_the_rest_of_the_module_is_asyncios_own(in_place):
    assert base.asyncio.sleep is asyncio.sleep
    with pytest.raises(AttributeError):
        _ = base.asyncio.no_such_thing
