"""The demo model's recipe: what is trained, in which order, for how long."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from expertgate.forge.corpus import PUBLIC, Sampler, Topic
from expertgate.forge.merge import Contribution, merge
from expertgate.forge.network import Shape, Tensors
from expertgate.forge.parts import Parts
from expertgate.forge.progress import Printer
from expertgate.forge.tokenizer import learn
from expertgate.forge.topics import closed_topics, closed_wordings, public_topics
from expertgate.forge.train import (
    Anchor,
    AnchoredPlan,
    Commons,
    Mixture,
    Progress,
    PublicMixture,
    Schedule,
    train_alone,
    train_expert,
    train_public,
)

VOCABULARY = 1536
TOKENIZER_EXCHANGES = 20_000
PUBLIC_SCHEDULE = Schedule(steps=1200, learning_rate=3e-3)
PUBLIC_MIXTURE = PublicMixture(public=46, lookalikes=10, single_steps=700)
ANCHORED = AnchoredPlan(
    schedule=Schedule(steps=400, learning_rate=4e-3),
    mixture=Mixture(own=36, wordings=2, public=8, lookalikes=8),
    margin=8.0,
)
UNBIASED = replace(ANCHORED, biased=False)
ALONE_SCHEDULE = Schedule(steps=250, learning_rate=2e-3)
ALONE_BATCH = 32


@dataclass(frozen=True)
class Forge:
    """One run's data and public model; everything else is made from it.

    What is trained is left in `parts`, and taken from there by a run that goes on.
    """

    seed: int
    commons: Commons
    closed: tuple[Topic, ...]
    anchor: Anchor
    parts: Parts

    def anchored(self, plan: AnchoredPlan = ANCHORED) -> dict[str, Tensors]:
        """The merged experts by name: each trained beside its own copy of the anchor."""

        def train(topic: Topic, anchor: Anchor, progress: Progress) -> Tensors:
            return train_expert(self.commons, anchor, topic, plan, self.seed, progress)

        return self._merged("expert" if plan.biased else "unbiased", train)

    def alone(self) -> dict[str, Tensors]:
        """The same without a public expert beside them: the ablation "no coordination"."""

        def train(topic: Topic, anchor: Anchor, progress: Progress) -> Tensors:
            schedule, batch = ALONE_SCHEDULE, ALONE_BATCH
            return train_alone(self.commons, anchor, topic, schedule, batch, self.seed, progress)

        return self._merged("alone", train)

    def _merged(
        self, kind: str, train: Callable[[Topic, Anchor, Progress], Tensors]
    ) -> dict[str, Tensors]:
        contributions: dict[str, Contribution] = {}
        for topic in self.closed:
            what = f"{kind}-{topic.name}"

            def contribute(topic: Topic = topic, what: str = what) -> Contribution:
                anchor = self.anchor.copy()
                return Contribution(anchor, train(topic, anchor, Printer(what)))

            contributions[topic.name] = self.parts.get(what, contribute)
        names = [PUBLIC, *contributions]
        return dict(zip(names, merge(self.anchor, contributions), strict=True))


def start(seed: int, parts: Parts) -> Forge:
    """Draws the datasets, learns the tokenizer and trains the public model."""
    topics, wordings = public_topics(seed), closed_wordings()
    tokenizer = _tokenizer(topics, wordings, seed)
    commons = Commons(Shape(vocab=len(tokenizer)), tokenizer, topics, wordings)

    def train() -> Anchor:
        return train_public(commons, PUBLIC_SCHEDULE, PUBLIC_MIXTURE, seed, Printer("public"))

    return Forge(seed, commons, closed_topics(seed), parts.get("public", train), parts)


def _tokenizer(
    topics: tuple[Topic, ...], wordings: tuple[Topic, ...], seed: int
) -> PreTrainedTokenizerFast:
    sampler = Sampler(seed + 1)
    texts: list[str] = []
    for _ in range(TOKENIZER_EXCHANGES):
        example = sampler.public(topics, wordings)
        texts += [example.question, example.answer, example.system]
    return learn(texts, VOCABULARY)
