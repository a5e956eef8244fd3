"""The plug-in under vLLM's own worker, as plain `vllm serve` runs it: `public` and nobody else."""

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform

from expertgate.model.masks import EXTRA_ARG
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.engine import engine
from tests.support.oracle import RowDeletion

PROMPT = list(b"Who may consult which expert?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"))


def ask(served, extra_args):
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
    [output] = served.llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_without_our_worker_only_public_speaks(folder):
    with engine(folder, worker_cls="auto") as served:
        silent = ask(served, None)
        served.forget()
        # On a GPU the model brings its masks along, and vLLM's own port obeys whoever asks there.
        wishful = ask(served, {EXTRA_ARG: ExpertSet.first(7).mask})
    oracle = RowDeletion(folder)
    assert silent == oracle.force(PUBLIC_ONLY, PROMPT, silent).best
    if current_platform.is_cpu():
        assert wishful == silent
