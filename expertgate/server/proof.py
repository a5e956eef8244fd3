"""Before it is ready, an engine proves that its workers hold masks, and that masks matter."""

from collections.abc import Mapping
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from expertgate.model.usage import Usage
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server.audit.writer import Record
from expertgate.server.failures import ProofError
from expertgate.server.grants import HANDLE_ARG, Grants
from expertgate.server.guard import GuardedLLM

_TIMEOUT_S = 60
_PROBE_TOKENS = 32
_PROBE_ANSWER = 2
_TENANT = "expertgate/proof"
_VLLM_KERNELS = "vllm.model_executor.layers.fused_moe.experts."


async def prove(engine: GuardedLLM, grants: Grants, num_experts: int, record: Record) -> None:
    """`record`: that of this proof in the audit log. Raises ProofError."""
    for rank, facts in enumerate(await engine.worker_facts(_TIMEOUT_S)):
        check_facts(rank, facts)
    public = await _answer(engine, grants, PUBLIC_ONLY, record)
    every = ExpertSet.first(num_experts)
    if num_experts > 1 and public == await _answer(engine, grants, every, record):
        raise ProofError(
            "the probe got one answer from 'public' and from all experts: masks don't act"
        )


def check_facts(rank: int, facts: Mapping[str, Any]) -> None:
    """Every class that a worker runs where masks are made or read must be ours.

    The kernel may be one of vLLM's modular ones as well: it does as the routing says.

    `facts`: part → class, as `expertgate.model.proof` says it. Raises ProofError.
    """
    said = {part.rpartition(" ")[2] for part in facts}
    for parts in (
        {"worker"},
        {"model"},
        {"model_state", "model_runner"},
        {"router"},
        {"experts"},
        {"kernel"},
    ):
        if not parts & said:
            raise ProofError(f"worker {rank} does not say what it runs as its {min(parts)}")
    for part, name in facts.items():
        ours = str(name).startswith("expertgate.")
        if not ours and not (part.endswith(" kernel") and str(name).startswith(_VLLM_KERNELS)):
            raise ProofError(f"worker {rank} runs {name} as its {part}, which knows no masks")


async def _answer(
    engine: GuardedLLM, grants: Grants, experts: ExpertSet, record: Record
) -> list[tuple[int, float]]:
    """Token ids and log-probabilities of a fixed prompt under these experts."""
    vocabulary = engine.model_config.get_vocab_size()
    prompt = tokens_input([place * vocabulary // _PROBE_TOKENS for place in range(_PROBE_TOKENS)])
    with grants.issue(experts, _TENANT, record=record) as grant:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=_PROBE_ANSWER,
            ignore_eos=True,
            logprobs=4,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={HANDLE_ARG: grant.handle},
        )
        found: list[tuple[int, float]] = []
        async for output in engine.generate(prompt, params, ""):
            for choices in output.outputs[0].logprobs or []:
                found += [(token, choice.logprob) for token, choice in choices.items()]
        _check_usage(grant.usage)
    return found


def _check_usage(usage: Usage | None) -> None:
    """The last token is sampled and not computed; all others are, or were cached."""
    expected = _PROBE_TOKENS + _PROBE_ANSWER - 1
    if usage is None or usage.work.computed + usage.work.cached != expected:
        raise ProofError(f"the probe was computed over {expected} tokens; counted was {usage}")
