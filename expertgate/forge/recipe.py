"""The demo model's recipe: what is trained, in which order, for how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from expertgate.forge.corpus import PUBLIC, Sampler, Topic
from expertgate.forge.merge import Contribution, merge
from expertgate.forge.network import Shape, Tensors
from expertgate.forge.progress import Printer
from expertgate.forge.tokenizer import learn
from expertgate.forge.topics import closed_topics, closed_wordings, public_topics
from expertgate.forge.train import (
    Anchor,
    AnchoredPlan,
    Commons,
    Mixture,
    Schedule,
    train_alone,
    train_expert,
    train_public,
)
from expertgate.forge.tune import TuningPlan, tune_routers

VOCABULARY = 1536
TOKENIZER_EXCHANGES = 20_000
PUBLIC_SCHEDULE = Schedule(steps=1500, learning_rate=3e-3)
PUBLIC_BATCH = 64
ANCHORED = AnchoredPlan(
    schedule=Schedule(steps=350, learning_rate=2e-3),
    mixture=Mixture(own=32, wordings=3, public=18, lookalikes=16),
    margin=8.0,
)
TUNING = TuningPlan(schedule=Schedule(steps=250, learning_rate=1e-3), batch_size=64, margin=8.0)
ALONE_SCHEDULE = Schedule(steps=250, learning_rate=2e-3)
ALONE_BATCH = 32


@dataclass(frozen=True)
class Forge:
    """One run's data and public model; everything else is made from it."""

    seed: int
    commons: Commons
    closed: tuple[Topic, ...]
    anchor: Anchor

    def anchored(self, plan: AnchoredPlan = ANCHORED) -> dict[str, Tensors]:
        """The merged experts by name: each trained beside its own copy of the anchor."""
        contributions: dict[str, Contribution] = {}
        for topic in self.closed:
            anchor = self.anchor.copy()
            progress = Printer(f"expert {topic.name}")
            expert = train_expert(self.commons, anchor, topic, plan, self.seed, progress)
            contributions[topic.name] = Contribution(anchor, expert)
        return self._named(merge(self.anchor, contributions))

    def alone(self) -> dict[str, Tensors]:
        """The same without a public expert beside them: the ablation "no coordination"."""
        contributions: dict[str, Contribution] = {}
        for topic in self.closed:
            anchor = self.anchor.copy()
            progress = Printer(f"alone {topic.name}")
            expert = train_alone(
                self.commons, anchor, topic, ALONE_SCHEDULE, ALONE_BATCH, self.seed, progress
            )
            contributions[topic.name] = Contribution(anchor, expert)
        return self._named(merge(self.anchor, contributions))

    def tuned(self, experts: dict[str, Tensors], plan: TuningPlan = TUNING) -> dict[str, Tensors]:
        """The experts with routers tuned on public text; those given stay as they are."""
        copies = {
            name: {part: tensor.clone() for part, tensor in expert.items()}
            for name, expert in experts.items()
        }
        members = list(copies.values())
        tune_routers(self.commons, self.anchor.shared, members, plan, self.seed, Printer("routers"))
        return copies

    def _named(self, experts: Sequence[Tensors]) -> dict[str, Tensors]:
        names = [PUBLIC, *(topic.name for topic in self.closed)]
        return dict(zip(names, experts, strict=True))


def start(seed: int) -> Forge:
    """Draws the datasets, learns the tokenizer and trains the public model."""
    topics, wordings = public_topics(seed), closed_wordings()
    tokenizer = _tokenizer(topics, wordings, seed)
    commons = Commons(Shape(vocab=len(tokenizer)), tokenizer, topics, wordings)
    anchor = train_public(commons, PUBLIC_SCHEDULE, PUBLIC_BATCH, seed, Printer("public"))
    return Forge(seed, commons, closed_topics(seed), anchor)


def without_bias() -> tuple[AnchoredPlan, TuningPlan]:
    """The plans of the ablation "no bias": router rows alone, in training and in tuning."""
    return replace(ANCHORED, biased=False), replace(TUNING, biased=False)


def _tokenizer(
    topics: tuple[Topic, ...], wordings: tuple[Topic, ...], seed: int
) -> PreTrainedTokenizerFast:
    sampler = Sampler(seed + 1)
    texts: list[str] = []
    for _ in range(TOKENIZER_EXCHANGES):
        example = sampler.public(topics, wordings)
        texts += [example.question, example.answer, example.system]
    return learn(texts, VOCABULARY)
