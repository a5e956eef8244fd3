"""Makes the demo model from nothing: `python -m expertgate.forge.demo --out DIR`."""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from expertgate.forge import card, checkpoint, recipe
from expertgate.forge.corpus import PUBLIC, Example
from expertgate.forge.evaluate import exact, expert_sets, score_sets, write_answer
from expertgate.forge.network import Tensors
from expertgate.forge.parts import Parts
from expertgate.forge.questions import Questions, held_out, validation
from expertgate.forge.recipe import Forge

# Sums of floats depend on how they are shared out among threads, so their number is fixed too.
THREADS = 1
SAMPLES = 5

Experts = dict[str, Tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder, or one where a run was cut off"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ablations", action="store_true", help="also train and evaluate the card's ablations"
    )
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, ablations=arguments.ablations)


def make(out: Path, seed: int, *, ablations: bool) -> None:
    """Writes `out/model` and `out/questions.json`; `out/parts` keeps what led to them."""
    torch.set_num_threads(THREADS)
    forge = recipe.start(seed, Parts(out / "parts"))
    experts = forge.anchored()
    model = out / "model"
    checkpoint.write(
        model,
        forge.commons.shape,
        forge.anchor.shared,
        list(experts.values()),
        forge.commons.tokenizer,
        forge.closed,
    )
    topics = forge.commons.topics
    questions = Questions(topics, forge.closed, held_out)
    right = _right("right", forge, experts, questions)
    seconds = sum(forge.parts.seconds.values())
    chosen_by = Questions(topics, forge.closed, validation)
    evaluation: dict[str, Any] = {
        "seed": seed,
        "cpu_seconds": round(seconds),
        "questions": {group: len(asked) for group, asked in questions.of(()).items()},
        "right": right,
        "validation": _right("validation", forge, experts, chosen_by),
    }
    print(json.dumps(evaluation, indent=1), flush=True)
    if ablations:
        variants = {
            "bias dropped after training": _no_bias(experts),
            "no bias": forge.anchored(recipe.UNBIASED),
            "no coordination": forge.alone(),
        }
        evaluation["ablations"] = {
            name: _right(f"right with {name}", forge, variant, questions)
            for name, variant in variants.items()
        }
    (model / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    (model / "README.md").write_text(card.write(evaluation, forge.closed))
    samples = {
        "joint": _joint_sample(forge, experts, questions),
        "single": _samples(forge, experts, questions),
    }
    (out / "questions.json").write_text(json.dumps(samples, indent=2) + "\n")


def _right(what: str, forge: Forge, experts: Experts, questions: Questions) -> card.Counts:
    """Right answers by expert set and group of questions, of weights as they are shipped."""

    def score() -> card.Counts:
        return score_sets(
            forge.commons.shape,
            _shipped(forge.anchor.shared),
            {name: _shipped(expert) for name, expert in experts.items()},
            forge.commons.tokenizer,
            questions.of,
        )

    return forge.parts.get(what, score)


def _no_bias(experts: Experts) -> Experts:
    return {
        name: {
            part: torch.zeros_like(tensor) if part.endswith(".bias") else tensor
            for part, tensor in expert.items()
        }
        for name, expert in experts.items()
    }


def _shipped(tensors: Tensors) -> Tensors:
    """Rounded to bf16. Arithmetic is in fp32: CPUs without bf16 take ten times as long for it."""
    return {name: tensor.float() for name, tensor in checkpoint.rounded(tensors).items()}


class _Answering:
    """The model as it is shipped, in arithmetic too."""

    def __init__(self, forge: Forge, experts: Experts) -> None:
        self._shape, self._tokenizer = forge.commons.shape, forge.commons.tokenizer
        self._shared = checkpoint.rounded(forge.anchor.shared)
        self._experts = {name: checkpoint.rounded(expert) for name, expert in experts.items()}

    def right(self, present: Collection[str], asked: list[Example]) -> list[bool]:
        chosen = self._chosen(present)
        return exact(self._shape, self._shared, chosen, self._tokenizer, asked)

    def answer(self, present: Collection[str], question: str) -> str:
        chosen = self._chosen(present)
        return write_answer(self._shape, self._shared, chosen, self._tokenizer, question)

    def _chosen(self, present: Collection[str]) -> list[Tensors]:
        return [expert for name, expert in self._experts.items() if name in present]


def _samples(forge: Forge, experts: Experts, questions: Questions) -> list[dict[str, str]]:
    """A few held-out questions a domain that are answered right, and who answers what.

    `with`: its expert beside the public one; `all`: every expert; `without`: the public one alone.
    """
    model = _Answering(forge, experts)
    samples = []
    for domain, asked in questions.by_domain.items():
        sets = {"with": {PUBLIC, domain}, "all": set(experts), "without": {PUBLIC}}
        # From all over the list, and more than are needed: a few are answered wrong.
        some = asked[:: len(asked) // (4 * SAMPLES)]
        right = [model.right(sets[key], some) for key in ("with", "all")]
        good = [example for example, *both in zip(some, *right, strict=True) if all(both)]
        for example in good[:: len(good) // SAMPLES][:SAMPLES]:
            sample = {
                "domain": domain,
                "question": example.question,
                "expected": example.answer,
            }
            for key, present in sets.items():
                sample[key] = model.answer(present, example.question)
            samples.append(sample)
    return samples


def _joint_sample(forge: Forge, experts: Experts, questions: Questions) -> dict[str, Any]:
    """The first joint question that every expert set answers right, and those answers."""
    model = _Answering(forge, experts)
    sets = expert_sets([name for name in experts if name != PUBLIC])
    good = questions.joint
    # The largest set first: it is the hardest, and leaves few to ask the others.
    for present in sorted(sets.values(), key=len, reverse=True):
        right = model.right(present, [asked.answered(present) for asked in good])
        good = [asked for asked, is_right in zip(good, right, strict=True) if is_right]
    answers = {label: good[0].answered(present).answer for label, present in sets.items()}
    return {"question": good[0].question, "answers": answers}


if __name__ == "__main__":
    main()
