"""What was cached before an expert was taken away must not be found once it is given back.

In each case nobody is asking when that happens, so no request is ended by it.
"""

import asyncio
import json

import pytest
from vllm.sampling_params import SamplingParams

from expertgate.server.errors import ApiError
from expertgate.server.grants import HANDLE_ARG
from tests.server.audit.logs import RECORDED
from tests.server.running import EXPERTS
from tests.server.sites import ALICE, PUBLIC, RESEARCH, Site

FORBID = PUBLIC + ALICE + RESEARCH + 'forbid(principal, action, resource == Expert::"math");\n'
UNTAGGED = [{**one, "tags": []} if one["name"] == "math" else one for one in EXPERTS]
CATALOGUE = json.dumps({"version": 1, "experts": UNTAGGED})
TAKEN = {
    "policy": ("policies/all.cedar", lambda text: FORBID),
    "catalogue": ("experts.json", lambda text: CATALOGUE),
    "suspension": ("suspended.yaml", lambda text: "- math\n"),
    "group of the key": ("keys.yaml", lambda text: text.replace("research", "search")),
    "key": ("keys.yaml", lambda text: text[: text.index("- id: dave")]),
}


async def salt(site, *experts):
    """Under which the engine caches what dave asks."""
    grant = await site.ask("dave", *experts)
    grant.recorded = RECORDED
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    params = SamplingParams(extra_args={HANDLE_ARG: grant.handle})
    async for _ in site.service.engine.generate(prompt, params, "id"):
        pass
    grant.close()
    return site.engine.calls[-1].prompt["cache_salt"]


@pytest.mark.parametrize("how", TAKEN)
def test_it_is_out_of_reach_for_good(tmp_path, how):
    place, taken = TAKEN[how]
    path = tmp_path / place
    site = Site(tmp_path)
    kept = path.read_text() if path.exists() else "[]\n"

    async def story():
        before = await salt(site, "public", "math")
        assert await salt(site, "public", "math") == before
        path.write_text(taken(kept))
        await site.look()
        with pytest.raises(ApiError) as error:
            await site.ask("dave", "public", "math")
        assert error.value.status in (401, 403)
        path.write_text(kept)
        await site.look()
        assert await salt(site, "public", "math") != before

    asyncio.run(story())


@pytest.mark.parametrize("how", ["policy", "catalogue", "suspension"])
def test_other_sets_keep_theirs(tmp_path, how):
    place, taken = TAKEN[how]
    site = Site(tmp_path)

    async def story():
        before = await salt(site, "public", "code")
        (tmp_path / place).write_text(taken(""))
        await site.look()
        assert await salt(site, "public", "code") == before

    asyncio.run(story())
