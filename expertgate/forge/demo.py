"""Makes the demo model from nothing: `python -m expertgate.forge.demo --out DIR`."""

import argparse
import json
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from expertgate.forge import card, checkpoint, recipe
from expertgate.forge.corpus import PUBLIC, Example, held_out
from expertgate.forge.evaluate import exact, score_sets, write_answer
from expertgate.forge.network import Tensors
from expertgate.forge.recipe import Forge

# Sums of floats depend on how they are shared out among threads, so their number is fixed too.
THREADS = 1
SAMPLES = 5

Table = dict[str, dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ablations", action="store_true", help="also train and evaluate the card's ablations"
    )
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, ablations=arguments.ablations)


def make(out: Path, seed: int, *, ablations: bool) -> None:
    """Writes `out/model` and `out/questions.json`."""
    torch.set_num_threads(THREADS)
    began = monotonic()
    forge = recipe.start(seed)
    merged = forge.anchored()
    tuned = forge.tuned(merged)
    model = out / "model"
    checkpoint.write(
        model,
        forge.commons.shape,
        forge.anchor.shared,
        list(tuned.values()),
        forge.commons.tokenizer,
        forge.closed,
    )
    seconds = round(monotonic() - began)
    questions = _questions(forge)
    evaluation: dict[str, Any] = {
        "seed": seed,
        "seconds": seconds,
        "threads": THREADS,
        "questions": {domain: len(asked) for domain, asked in questions.items()},
        "right": _as_shipped(forge, tuned, questions),
    }
    print(json.dumps(evaluation["right"], indent=1), flush=True)
    if ablations:
        evaluation["ablations"] = _ablations(forge, merged, tuned, questions)
    (model / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    (model / "README.md").write_text(card.write(evaluation, forge.closed))
    samples = _samples(forge, tuned, questions)
    (out / "questions.json").write_text(json.dumps(samples, indent=2) + "\n")


def _questions(forge: Forge) -> dict[str, list[Example]]:
    """Every held-out question, by the domain that should answer it."""
    public = [example for topic in forge.commons.topics for example in held_out(topic)]
    return {PUBLIC: public} | {topic.name: held_out(topic) for topic in forge.closed}


def _as_shipped(
    forge: Forge, experts: dict[str, Tensors], questions: dict[str, list[Example]]
) -> Table:
    """Right answers by expert set and domain, of weights and arithmetic in bf16."""
    table = score_sets(
        forge.commons.shape,
        checkpoint.rounded(forge.anchor.shared),
        {name: checkpoint.rounded(expert) for name, expert in experts.items()},
        forge.commons.tokenizer,
        questions,
    )
    return {
        label: {domain: score.right for domain, score in row.items()}
        for label, row in table.items()
    }


def _ablations(
    forge: Forge,
    merged: dict[str, Tensors],
    tuned: dict[str, Tensors],
    questions: dict[str, list[Example]],
) -> dict[str, Table]:
    """What the recipe's parts are worth: each left out, and all else as it is."""
    anchored, tuning = recipe.without_bias()
    unbiased = forge.anchored(anchored)
    alone = forge.alone()
    variants = {
        "no router tuning": merged,
        "bias dropped after training": _no_bias(tuned),
        "no bias": forge.tuned(unbiased, tuning),
        "no bias, no router tuning": unbiased,
        "no coordination": alone,
        "no coordination, routers tuned": forge.tuned(alone),
    }
    return {name: _as_shipped(forge, experts, questions) for name, experts in variants.items()}


def _no_bias(experts: dict[str, Tensors]) -> dict[str, Tensors]:
    return {
        name: {
            part: torch.zeros_like(tensor) if part.endswith(".bias") else tensor
            for part, tensor in expert.items()
        }
        for name, expert in experts.items()
    }


def _samples(
    forge: Forge, experts: dict[str, Tensors], questions: dict[str, list[Example]]
) -> list[dict[str, str]]:
    """A few held-out questions a domain that are answered right, and who answers what.

    `with`: its expert beside the public one; `all`: every expert; `without`: the public one alone.
    """
    shape, tokenizer = forge.commons.shape, forge.commons.tokenizer
    shared = checkpoint.rounded(forge.anchor.shared)
    members = {name: checkpoint.rounded(expert) for name, expert in experts.items()}
    samples = []
    for domain, asked in questions.items():
        sets = {"with": {PUBLIC, domain}, "all": set(members), "without": {PUBLIC}}
        present = {
            key: [members[name] for name in members if name in names] for key, names in sets.items()
        }
        right = [exact(shape, shared, present[key], tokenizer, asked) for key in ("with", "all")]
        good = [example for example, *both in zip(asked, *right, strict=True) if all(both)]
        for example in good[:: len(good) // SAMPLES][:SAMPLES]:
            sample = {
                "domain": domain,
                "question": example.question,
                "expected": example.answer,
            }
            for key, chosen in present.items():
                sample[key] = write_answer(shape, shared, chosen, tokenizer, example.question)
            samples.append(sample)
    return samples


if __name__ == "__main__":
    main()
