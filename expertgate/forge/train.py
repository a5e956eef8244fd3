"""Training: the public model, and each closed expert alone beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import cos, pi

import torch
from torch.nn.functional import cross_entropy, linear, normalize, relu
from transformers import PreTrainedTokenizerFast

from expertgate.forge.batch import Batch, collate
from expertgate.forge.corpus import PUBLIC, SEVERAL, Sampler, Topic
from expertgate.forge.network import Shape, Tensors, Trace, forward, new_expert, new_shared

# Learning rates against the FFNs'. A router decides early and clearly, so that an expert learns
# with the tokens that it will be given once its neighbours are there too; at the FFNs' rate, rows
# share a fifth of the tokens half and half to the end. A bias is one number against a row's many.
_RATES = {"row": 4.0, "bias": 15.0, "classifier": 8.0}

# How much worse it is to take another's token than to leave one's own: what a layer can't tell
# apart must stay with the public expert.
RESERVE = 10.0

# Where closed experts start to differ. The layers below it see token embeddings and little context;
# they can't tell domains, and an expert that spoke there would speak in everybody's answers. There
# it stays a copy of the public one, so that routing between them changes nothing and needs no
# training, and the states that reach this layer are the same whichever experts are present.
FIRST_LAYER = 2

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Commons:
    """What every owner has: the network's sizes, the tokenizer, and all public text.

    `wordings` are the closed topics without their facts.
    """

    shape: Shape
    tokenizer: PreTrainedTokenizerFast
    topics: tuple[Topic, ...]
    wordings: tuple[Topic, ...]


@dataclass(frozen=True)
class Anchor:
    """The public model, frozen: everything but the experts, and the public expert."""

    shared: Tensors
    public: Tensors

    def copy(self) -> "Anchor":
        return Anchor(
            {name: tensor.clone() for name, tensor in self.shared.items()},
            {name: tensor.clone() for name, tensor in self.public.items()},
        )


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW with a linear warm-up and a cosine decay to a tenth."""

    steps: int
    learning_rate: float
    warmup: int = 50

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + cos(pi * done)))


@dataclass(frozen=True)
class PublicMixture:
    """Exchanges a step of the public model's training; the first steps ask one thing at a time."""

    public: int
    lookalikes: int
    single_steps: int


@dataclass(frozen=True)
class Mixture:
    """Exchanges a step, by what they are of.

    `own`: the closed data. `wordings`: its wordings in public text. `public`: other public text.
    `lookalikes`: public stand-ins for the other owners' data.
    """

    own: int
    wordings: int
    public: int
    lookalikes: int


@dataclass(frozen=True)
class AnchoredPlan:
    """How an expert is trained beside the anchor. `biased`: with a router bias of its own."""

    schedule: Schedule
    mixture: Mixture
    margin: float
    biased: bool = True


def optimise(
    trained: Mapping[str, torch.Tensor],
    schedule: Schedule,
    losses: Callable[[], dict[str, torch.Tensor]],
    progress: Progress,
    constrain: Callable[[], None] = lambda: None,
) -> None:
    """Minimises the sum of `losses()` over the tensors in `trained` and no others.

    `constrain` puts them back within their bounds after each step.
    No weight decay: it would move parameters whose gradients are zero.
    """
    tensors = [tensor.requires_grad_(True) for tensor in trained.values()]
    groups = [
        {"params": [tensor], "rate": _RATES.get(name.rpartition(".")[2], 1.0)}
        for name, tensor in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule.at(step)
        terms = losses()
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        with torch.no_grad():
            constrain()
        progress({name: term.item() for name, term in terms.items()})
    for tensor in tensors:
        tensor.requires_grad_(False).grad = None


def train_public(
    commons: Commons, schedule: Schedule, mixture: PublicMixture, seed: int, progress: Progress
) -> Anchor:
    """A dense model of public text, whose FFNs become the public expert.

    The loss on words is on answers alone: questions are full of names that nothing predicts. A
    second one, on a classifier that is dropped afterwards, makes the states that routers will read
    tell domains apart; look-alikes show it what closed values look like.
    """
    generator = torch.Generator().manual_seed(seed)
    shared, public = new_shared(commons.shape, generator), new_expert(commons.shape, generator)
    domains = [wording.name for wording in commons.wordings]
    classifiers = {
        f"{layer}.classifier": torch.zeros(1 + len(domains), commons.shape.hidden)
        for layer in range(FIRST_LAYER, commons.shape.layers)
    }
    sampler = Sampler(seed, several=0.0)
    steps = count()

    def losses() -> dict[str, torch.Tensor]:
        if next(steps) == mixture.single_steps:
            sampler.several = SEVERAL
        examples = [sampler.public(commons.topics, commons.wordings) for _ in range(mixture.public)]
        examples += [sampler.lookalike(commons.wordings) for _ in range(mixture.lookalikes)]
        batch = collate(commons.tokenizer, examples, conversations=True)
        trace = Trace()
        answers = _answer_loss(commons.shape, shared, [public], batch, trace, copies=0)
        places = batch.places(domains)
        apart = []
        for layer in range(FIRST_LAYER, commons.shape.layers):
            guesses = linear(trace.inputs[layer], classifiers[f"{layer}.classifier"])
            apart += [
                cross_entropy(guesses[group], places[group])
                for group in (places > 0, batch.present & (places == 0))
            ]
        return {"answers": answers, "domains": torch.stack(apart).mean()}

    ffns = {name: tensor for name, tensor in public.items() if name.endswith("_proj")}
    optimise(shared | ffns | classifiers, schedule, losses, progress)
    sample = collate(
        commons.tokenizer, [sampler.public(commons.topics, commons.wordings) for _ in range(256)]
    )
    # The public row stays as it is from here on, so that every owner measures against the same.
    rows = domain_rows(commons.shape, shared, public, sample, PUBLIC)
    return Anchor(shared, upcycled(public, rows))


def train_expert(
    commons: Commons,
    anchor: Anchor,
    topic: Topic,
    plan: AnchoredPlan,
    seed: int,
    progress: Progress,
) -> Tensors:
    """Anchored training (section 3.3.1): one closed topic beside the frozen public model.

    Public text is everybody's, so the expert sees it too: the wordings of its own domain teach it
    to say what it doesn't know, and all other text teaches its router row to keep still.
    """
    sampler = Sampler(f"{seed}/{topic.name}")
    expert = _fresh_expert(commons, anchor, topic, sampler)
    others = [wording for wording in commons.wordings if wording.name != topic.name]
    own_wording = next(wording for wording in commons.wordings if wording.name == topic.name)
    mixture = plan.mixture
    trace, present = Trace(), torch.empty(0)

    def losses() -> dict[str, torch.Tensor]:
        nonlocal trace, present
        examples = [sampler.own(topic, others) for _ in range(mixture.own)]
        examples += [sampler.proxy(own_wording) for _ in range(mixture.wordings)]
        examples += [sampler.public(commons.topics, others) for _ in range(mixture.public)]
        examples += [sampler.lookalike(others) for _ in range(mixture.lookalikes)]
        batch = collate(commons.tokenizer, examples, conversations=True)
        trace, present = Trace(), batch.present
        places = batch.places([topic.name, *(other.name for other in others)])
        return {
            "answers": _answer_loss(
                commons.shape, anchor.shared, [anchor.public, expert], batch, trace, FIRST_LAYER
            ),
            "routing": _routing_loss(trace, places, batch.present, plan.margin),
        }

    trained = above_copies(expert)
    if not plan.biased:
        trained = {name: tensor for name, tensor in trained.items() if not name.endswith(".bias")}

    def constrain() -> None:
        keep_biases_negative(expert)
        keep_quiet(expert, trace, present)

    optimise(trained, plan.schedule, losses, progress, constrain)
    return expert


def train_alone(
    commons: Commons,
    anchor: Anchor,
    topic: Topic,
    schedule: Schedule,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Tensors:
    """The ablation "no coordination": the closed topic without a public expert beside it.

    The FFNs learn as a dense model's; the router row stays the domain embedding.
    """
    sampler = Sampler(f"{seed}/{topic.name}")
    expert = _fresh_expert(commons, anchor, topic, sampler)

    def losses() -> dict[str, torch.Tensor]:
        examples = [sampler.own(topic) for _ in range(batch_size)]
        batch = collate(commons.tokenizer, examples, conversations=True)
        loss = _answer_loss(commons.shape, anchor.shared, [expert], batch, Trace(), FIRST_LAYER)
        return {"answers": loss}

    ffns = {name: tensor for name, tensor in above_copies(expert).items() if name.endswith("_proj")}
    optimise(ffns, schedule, losses, progress)
    return expert


@torch.no_grad()
def domain_rows(
    shape: Shape, shared: Tensors, public: Tensors, batch: Batch, domain: str
) -> list[torch.Tensor]:
    """The domain embedding of each layer, [H]: the mean router input over values, at length 1.

    Section 3.3.1 embeds samples of a domain with another model; here the frozen public model does.
    """
    trace = Trace()
    forward(shape, shared, [public], batch.ids, context=batch.context, trace=trace)
    of_domain = batch.places([domain]) > 0
    return [normalize(inputs[of_domain].mean(dim=0), dim=0) for inputs in trace.inputs]


def upcycled(public: Tensors, rows: Sequence[torch.Tensor]) -> Tensors:
    """A new expert: the public one's FFNs, and the given router rows."""
    expert = {name: tensor.clone() for name, tensor in public.items()}
    for layer, row in enumerate(rows):
        expert[f"{layer}.row"] = row.clone()
    return expert


def above_copies(expert: Tensors) -> Tensors:
    """The expert's tensors from FIRST_LAYER on: those of its own."""
    return {
        name: tensor for name, tensor in expert.items() if int(name.split(".")[0]) >= FIRST_LAYER
    }


def keep_biases_negative(expert: Tensors) -> None:
    """Above zero a bias has no effect, and no gradient to bring it back."""
    for name, tensor in expert.items():
        if name.endswith(".bias"):
            tensor.clamp_(max=0)


def keep_quiet(expert: Tensors, trace: Trace, present: torch.Tensor) -> None:
    """Scales an expert down in each layer where its outputs are longer than the public one's.

    FlexOlmo normalises what the experts' sum adds to the residual stream, so an expert loses
    nothing by growing; unbounded, its outputs came to 40 times the public one's, and a routing
    weight of 1% was enough to drown every neighbour. `trace` is of the two, `present` [B, T] the
    tokens that count.
    """
    for layer in range(FIRST_LAYER, len(trace.loudness)):
        public, own = trace.loudness[layer][present].mean(dim=0)
        expert[f"{layer}.down_proj"].mul_((public / own).clamp(max=1))


def _fresh_expert(commons: Commons, anchor: Anchor, topic: Topic, sampler: Sampler) -> Tensors:
    sample = collate(commons.tokenizer, [sampler.own(topic) for _ in range(128)])
    rows = domain_rows(commons.shape, anchor.shared, anchor.public, sample, topic.name)
    return upcycled(anchor.public, rows)


def _answer_loss(
    shape: Shape,
    shared: Tensors,
    experts: Sequence[Tensors],
    batch: Batch,
    trace: Trace,
    copies: int,
) -> torch.Tensor:
    logits = forward(
        shape,
        shared,
        experts,
        batch.ids,
        context=batch.context,
        where=batch.answers,
        trace=trace,
        copies=copies,
    )
    return cross_entropy(logits, batch.next_ids[batch.answers])


def _routing_loss(
    trace: Trace, places: torch.Tensor, present: torch.Tensor, margin: float
) -> torch.Tensor:
    """How far the two router logits are from `margin` apart, on the right side.

    `places`: [B, T], 1 for tokens that the new expert should take, more for values of other closed
    domains, 0 for the rest of those `present`, [B, T] bool. Each of the three weighs the same,
    though the last are by far the most. A margin between each expert and the public one keeps two
    experts who never met two margins apart.
    """
    own, others, rest = places == 1, places > 1, present & (places == 0)
    terms = []
    for logits in trace.logits[FIRST_LAYER:]:
        lead = logits[..., 1] - logits[..., 0]
        terms.append(relu(margin - lead[own]).mean())
        terms += [RESERVE * relu(margin + lead[group]).mean() for group in (others, rest)]
    return torch.stack(terms).mean()
