"""Router tuning: the merged model's router rows and biases, on public text alone (section 3.3.3).

No owner's data takes part. Public stand-ins for each closed dataset tell which expert should take
a token; the experts' FFNs only lend the hidden states that their neighbours had never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch.nn.functional import relu

from expertgate.forge.batch import collate
from expertgate.forge.corpus import Sampler
from expertgate.forge.network import Tensors, Trace, forward
from expertgate.forge.train import (
    FIRST_LAYER,
    Commons,
    Progress,
    Schedule,
    keep_biases_negative,
    optimise,
)

# How much worse it is for a closed expert to take another's token than to leave its own. Less than
# in the anchored training, where it keeps an expert that knows nothing yet from speaking: here a
# high price takes from experts what they were trained to answer.
RESERVE = 2.5

# The share of closed wordings that come with a made-up value rather than with a refusal.
LOOKALIKES = 0.7


@dataclass(frozen=True)
class TuningPlan:
    """How the routers are tuned. `biased`: their biases move too."""

    schedule: Schedule
    batch_size: int
    margin: float
    biased: bool = True


def tune_routers(
    commons: Commons,
    shared: Tensors,
    experts: Sequence[Tensors],
    plan: TuningPlan,
    seed: int,
    progress: Progress,
) -> None:
    """Moves the closed experts' rows and biases in place; the public row stays.

    The experts after the public one are in the order of `commons.wordings`. Each step leaves a
    random choice of experts out, as requests will: what an absent expert would have taken is the
    public one's.
    """
    sampler = Sampler(f"{seed}/tuning")
    rng = Random(f"{seed}/absent")  # noqa: S311 (data, not secrets)
    wordings = commons.wordings
    closed = plan.batch_size // 2

    def losses() -> dict[str, torch.Tensor]:
        drawn = [rng.randrange(len(wordings)) for _ in range(closed)]
        examples = [
            sampler.lookalike(wordings[place])
            if rng.random() < LOOKALIKES
            else sampler.proxy(wordings[place])
            for place in drawn
        ]
        examples += [sampler.open(commons.topics) for _ in range(plan.batch_size - closed)]
        batch = collate(commons.tokenizer, examples, conversations=True)
        count = rng.randint(1, len(experts) - 1)
        present = [0, *sorted(rng.sample(range(1, len(experts)), count))]
        # Where each exchange's answer should go, as a place among the experts present.
        takers = [present.index(place + 1) if place + 1 in present else 0 for place in drawn]
        takers += [0] * (plan.batch_size - closed)
        target = torch.where(batch.values, torch.tensor(takers)[batch.exchange], 0)
        trace = Trace()
        chosen = [experts[index] for index in present]
        forward(commons.shape, shared, chosen, batch.ids, context=batch.context, trace=trace)
        return {"routing": _margin_loss(trace, target, batch.present, plan.margin)}

    endings = (".row", ".bias") if plan.biased else (".row",)
    moved = {
        f"{index}.{name}": tensor
        for index, expert in enumerate(experts[1:], start=1)
        for name, tensor in expert.items()
        if name.endswith(endings)
    }

    def constrain() -> None:
        for expert in experts[1:]:
            keep_biases_negative(expert)

    optimise(moved, plan.schedule, losses, progress, constrain)


def _margin_loss(
    trace: Trace, target: torch.Tensor, present: torch.Tensor, margin: float
) -> torch.Tensor:
    """How far the target's logit is from leading every other one by `margin`.

    `target`: [B, T] int64, a place among the experts; `present`: [B, T] bool, no padding. As in
    the anchored training, it is worse for a closed expert to take another's token, be it the
    public one's or a neighbour's, than to leave its own to the public one. Tokens for closed
    experts and for the public one weigh the same, though the latter are many more.
    """
    terms = []
    for layer, logits in enumerate(trace.logits):
        wanted = target if layer >= FIRST_LAYER else torch.zeros_like(target)
        short = relu(margin - logits.gather(-1, wanted[..., None]) + logits)
        short = short.scatter(-1, wanted[..., None], 0.0)
        cost = short[..., 0] + RESERVE * short[..., 1:].sum(dim=-1)
        groups = (present & (wanted > 0), present & (wanted == 0))
        terms += [cost[group].mean() for group in groups if group.any()]
    return torch.stack(terms).mean()
