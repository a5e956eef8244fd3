"""What vLLM's sampler for CPUs does to a whole batch because of one request in it, undone.

Dimensions: N tokens, V words of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from expertgate.kernels.routing import rank_keys


def gather_logprobs(
    logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
) -> LogprobsTensors:
    """In place of vLLM's function of that name: of equal tokens the lower id comes first.

    VLLM takes as many for each token as anybody in the batch asks for, and lets each request see
    the first of them. In which order equal ones come, and so which of them are seen, would depend
    on that number; in bfloat16 there are many.

    `logprobs` [N, V] float32; `token_ids` [N] int64, which were sampled.
    """
    sampled = Sampler.gather_logprobs(logprobs, 0, token_ids)
    best = torch.topk(rank_keys(logprobs), num_logprobs, dim=-1)[1]
    return sampled._replace(
        logprob_token_ids=torch.cat((sampled.logprob_token_ids, best.to(torch.int32)), 1),
        logprobs=torch.cat((sampled.logprobs, logprobs.gather(-1, best)), 1),
    )


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """In place of vLLM's function of that name: what a request asked for, for each of its drafts.

    VLLM's for CPUs fills a copy, and gives back memory as it found it: temperatures and the like of
    drafted tokens were whatever had been left there.

    `x` [R]; `cu_num_tokens` [R], where each request's drafts end.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to)


def keep_all(metadata: Any) -> None:
    """Requests without `top_p` keep every token, also where others of the batch have one.

    VLLM would take from them what is too small to be added up, and log probabilities of what is
    left would show that.
    """
    if metadata.top_p is not None:
        metadata.top_p = torch.where(metadata.top_p < 1, metadata.top_p, 2.0)


@contextmanager
def without(generators: dict[int, Any], rows: Any) -> Iterator[None]:
    """Inside, the requests of these rows have no generator of their own, where they had one.

    `rows`: whether, by row. They are those whose prompt has been read in part: a token is sampled
    for them too and thrown away, and vLLM then winds their generators back, which those of a CPU
    can't do. They raise, and the engine dies. And what a seed draws must not show in how many parts
    a prompt was read, which depends on who else is served.
    """
    taken = {row: generators.pop(row) for row in list(generators) if rows[row]}
    try:
        yield
    finally:
        generators.update(taken)
