"""Before it is ready, an engine proves that its workers hold masks, and that masks matter."""

import secrets
from collections.abc import Mapping
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from expertgate.model.usage import Usage
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.server.audit.writer import Recorded
from expertgate.server.failures import ProofError
from expertgate.server.grants import HANDLE_ARG, Grants
from expertgate.server.guard import GuardedLLM

_TIMEOUT_S = 60
_PROBE_TOKENS = 32
_PROBE_ANSWER = 2
_TENANT = "expertgate/proof"
_VLLM_KERNELS = "vllm.model_executor.layers.fused_moe.experts."


async def prove(engine: GuardedLLM, grants: Grants, num_experts: int, recorded: Recorded) -> None:
    """`recorded`: how the audit log holds this probe. Raises ProofError."""
    for rank, facts in enumerate(await engine.worker_facts(_TIMEOUT_S)):
        check_facts(rank, facts)
    public = await _answer(engine, grants, PUBLIC_ONLY, recorded)
    every = ExpertSet.first(num_experts)
    if num_experts > 1 and public == await _answer(engine, grants, every, recorded):
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


async def prove_namespaces(
    engine: GuardedLLM, grants: Grants, num_experts: int, recorded: Recorded
) -> None:
    """Prefixes must be found again within a namespace of the cache, and never from another.

    Raises ProofError.
    """
    cache = engine.vllm_config.cache_config
    length = 2 * cache.block_size
    if not cache.enable_prefix_caching or length >= engine.model_config.max_model_len:
        return  # nothing is kept that could be found
    vocabulary = engine.model_config.get_vocab_size()
    prompt = [secrets.randbelow(vocabulary) for _ in range(length)]
    everyone = ExpertSet.first(num_experts)
    # All but the last, so that there are others which are as many.
    mine = ExpertSet.first(max(1, num_experts - 1))

    async def cached(experts: ExpertSet, tenant: str, own: str | None = None) -> int:
        found, _ = await _run(engine, grants, experts, recorded, tenant, prompt, own)
        return found.num_cached_tokens or 0

    own_namespace = (mine, _TENANT, "salt")
    if await cached(*own_namespace) or not await cached(*own_namespace):
        raise ProofError("a prefix was not found again by the same experts, tenant and salt")
    others = {
        "another tenant": (mine, f"{_TENANT}/other", "salt"),
        "another salt": (mine, _TENANT, "other"),
        "no salt": (mine, _TENANT, None),
    }
    if num_experts > 1:
        others["other experts"] = (everyone, _TENANT, "salt")
    if num_experts > 2:
        as_many = everyone - ExpertSet.of([num_experts - 2])
        others["as many other experts"] = (as_many, _TENANT, "salt")
    for what, namespace in others.items():
        if tokens := await cached(*namespace):
            raise ProofError(f"{what} found {tokens} tokens of a prefix that isn't theirs")


async def one_token(engine: GuardedLLM, grants: Grants, recorded: Recorded) -> None:
    """Has the engine write a token. Raises UnavailableError where it can't."""
    await _run(engine, grants, PUBLIC_ONLY, recorded, _TENANT, [0])


async def _answer(
    engine: GuardedLLM, grants: Grants, experts: ExpertSet, recorded: Recorded
) -> list[tuple[int, float]]:
    """Token ids and log-probabilities of a fixed prompt under these experts."""
    vocabulary = engine.model_config.get_vocab_size()
    prompt = [place * vocabulary // _PROBE_TOKENS for place in range(_PROBE_TOKENS)]
    output, usage = await _run(engine, grants, experts, recorded, _TENANT, prompt)
    _check_usage(usage)
    return [
        (token, choice.logprob)
        for choices in output.outputs[0].logprobs or []
        for token, choice in choices.items()
    ]


async def _run(
    engine: GuardedLLM,
    grants: Grants,
    experts: ExpertSet,
    recorded: Recorded,
    tenant: str,
    prompt: list[int],
    salt: str | None = None,
) -> tuple[RequestOutput, Usage | None]:
    with grants.issue(experts, tenant, recorded=recorded) as grant:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=_PROBE_ANSWER,
            ignore_eos=True,
            logprobs=4,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={HANDLE_ARG: grant.handle},
        )
        last: RequestOutput | None = None
        async for output in engine.generate(tokens_input(prompt, cache_salt=salt), params, ""):
            last = output
    if last is None:
        raise ProofError("the engine ended a probe without an answer")
    return last, grant.usage


def _check_usage(usage: Usage | None) -> None:
    """The last token is sampled and not computed; all others are, or were cached."""
    expected = _PROBE_TOKENS + _PROBE_ANSWER - 1
    if usage is None or usage.work.computed + usage.work.cached != expected:
        raise ProofError(f"the probe was computed over {expected} tokens; counted was {usage}")
