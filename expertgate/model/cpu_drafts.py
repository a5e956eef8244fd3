"""Drafts that vLLM's scheduler makes up, taken out of a step on CPUs before it runs.

Where a request has one token left to read, the scheduler gives it as many drafts as others may
have, each -1, so that a CUDA graph fits the step. On CPUs there is no such graph, and vLLM's
sampler for them takes -1 for a token: its probability is what stands before the request's own,
which is that of another request's last word. Whether a made-up draft was taken would depend on it.
"""

from dataclasses import replace

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

_MADE_UP = -1


def without_made_up(step: SchedulerOutput) -> SchedulerOutput:
    """The step as it runs. A copy, because the scheduler keeps its accounts by the one it made."""
    drafts = step.scheduled_spec_decode_tokens
    real = {name: tokens for name, tokens in drafts.items() if _MADE_UP not in tokens}
    if len(real) == len(drafts):
        return step
    lengths = dict(step.num_scheduled_tokens)
    for name in drafts.keys() - real.keys():
        lengths[name] -= len(drafts[name])
    return replace(
        step,
        num_scheduled_tokens=lengths,
        total_num_scheduled_tokens=sum(lengths.values()),
        scheduled_spec_decode_tokens=real,
    )


def as_it_runs(grammars: GrammarOutput, step: SchedulerOutput) -> GrammarOutput:
    """What grammars allow in a step that runs without what was made up.

    `step`: with it. A request has a row for each of its drafts, and one behind them.
    """
    rows: list[int] = []
    first = 0
    for name in grammars.structured_output_request_ids:
        drafts = step.scheduled_spec_decode_tokens.get(name, ())
        rows += range(first, first + 1 + (0 if _MADE_UP in drafts else len(drafts)))
        first += 1 + len(drafts)
    if len(rows) == first:
        return grammars
    return replace(grammars, grammar_bitmask=grammars.grammar_bitmask[rows])
