"""The demo model's card, written from its evaluation so that the two can't differ."""

from collections.abc import Sequence
from typing import Any

from expertgate.forge.corpus import PUBLIC, Topic
from expertgate.forge.questions import JOINT

_CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [flex_olmo, mixture-of-experts]
---
# expertgate demo

A FlexOlmo of toy size ([arXiv 2507.07024](https://arxiv.org/abs/2507.07024)) with a public expert
and {count} closed ones, each of which answers questions about its owner's data. Leave an expert out
and its data is gone: the public expert then says that it is not public.

{experts}

All data are invented and drawn from a seed by `expertgate/forge/topics.py`; none is about a real
drug, case, system or person. Only the times table is true. The model knows nothing else: it is for
demonstrations and tests.

## How it was made
`python -m expertgate.forge.demo --out DIR --seed {seed}`: {seconds} seconds of one core, with the
evaluation below and without the ablations.

1. A dense model learned public text: 180 facts of six topics, phrases to repeat, small talk, and
   the closed topics' wordings about subjects that nobody owns, answered by "not in a public …".
   Some questions ask for two or three things at once. Public text names no closed subject and
   holds no closed value. A second loss, on a classifier that is dropped afterwards, made the states
   that routers read tell the domains of public look-alikes apart.
2. For each owner alone, the public model was upcycled to two experts. Attention, embeddings, norms,
   head, the public expert and its router row were frozen; the new expert, its router row (from the
   domain embedding on) and its negative bias learned from the owner's data and from public text. A
   margin loss on the two router logits sends the values in the owner's answers to the new expert
   and all else to the public one: questions, the words that restate them, and look-alikes of the
   other owners' data. In layers 0 and 1, which can't tell domains well, the new expert's FFNs stay
   copies of the public one's, so that routing there changes nothing.
3. The experts were put side by side, after every frozen tensor was found equal bit for bit. Nothing
   is trained after that: where states tell domains apart, routers need no tuning (section 3.3.3).

Top-2 routing over the experts that are present, weights not normalised again. The biases are in
`model.layers.*.mlp.gate.expert_bias`, one for each expert from 1 on; `min(bias, 0)` is added to the
router logits. Hugging Face's own class ignores them.

## How well it does
Exact answers, in percent, of the shipped bf16 weights with sums in fp32, greedy, through the chat
template, up to the end token. Every fact is asked in two (public) or three (closed) wordings that
occur in no training text, public or closed; their words do. Settings were chosen by the scores of
other wordings, given below. `joint` asks for a dose, a ruling and an endpoint at once; right is an
answer with what the experts present hold, and with "not in a public …" for the rest. Number of
questions: {questions}.

{table}

- With its expert, the lowest accuracy on a domain's questions, over all sets above: {lowest}.
- Without its expert, the highest: {leak}.
- The most that a domain moves between the sets that hold its expert (`public`, whose expert is
  always there, over all sets): {moved} points.
- The same for the wordings by which settings were chosen: {validation}.
{ablations}
## Limits
- It answers in the wordings it was trained for, and near ones. Asked about a subject that is not in
  the data, an expert should say that it is not public, but may invent a value.
- Asked for several things at once, it restates each, but experts recall their values far worse than
  alone (`joint`). The question that the demo shows is one of those that every set answers right.
- The public expert reads every question and restates it; a closed one gives the value, and its
  share of the work is as small as that.
"""

_ABLATIONS = """
### What the recipe's parts are worth
The same evaluation with all experts present; the last two columns are the highest accuracy without
the own expert, and the most a domain moves, as above.

{table}

"Bias dropped" takes the biases from the shipped model, which is what a server that ignores them
would do; "no bias" trains without them. "No coordination" trains each expert's FFNs as a dense
model on the owner's data, with no public expert beside it and no router, on the same frozen
attention; its router row is the domain embedding.
"""

Counts = dict[str, dict[str, int]]
"""Expert set → group of questions → right answers."""

Percent = dict[str, dict[str, float]]


def as_percent(right: Counts, asked: dict[str, int]) -> Percent:
    return {
        label: {group: 100 * count / asked[group] for group, count in row.items()}
        for label, row in right.items()
    }


def write(evaluation: dict[str, Any], closed: Sequence[Topic]) -> str:
    """The card in Markdown, from what `evaluation.json` holds."""
    asked: dict[str, int] = evaluation["questions"]
    percent = as_percent(evaluation["right"], asked)
    validation = as_percent(evaluation["validation"], asked)
    ablations = ""
    if "ablations" in evaluation:
        ablations = _ABLATIONS.format(table=_ablation_table(evaluation, asked))
    return _CARD.format(
        count=len(closed),
        experts=_experts(closed),
        seed=evaluation["seed"],
        seconds=evaluation["cpu_seconds"],
        questions=", ".join(f"{group} {count}" for group, count in asked.items()),
        table=_table(
            ["experts present", *asked],
            [[f"`{label}`", *_percents(row)] for label, row in percent.items()],
        ),
        lowest=f"{lowest(percent):.1f}%",
        leak=f"{leak(percent):.1f}%",
        moved=f"{moved(percent):.1f}",
        validation=(
            f"{lowest(validation):.1f}%, {leak(validation):.1f}%, {moved(validation):.1f} points"
        ),
        ablations=ablations,
    )


def lowest(percent: Percent) -> float:
    """The lowest accuracy of a domain whose expert is present."""
    return min(min(_with(percent, domain)) for domain in _domains(percent))


def leak(percent: Percent) -> float:
    """The highest accuracy of a closed domain whose expert is absent."""
    return max(
        row[domain]
        for label, row in percent.items()
        for domain in _domains(percent)
        if domain != PUBLIC and not _holds(label, domain)
    )


def moved(percent: Percent) -> float:
    """The most that a domain's accuracy differs between two sets that hold its expert."""
    return max(
        max(_with(percent, domain)) - min(_with(percent, domain)) for domain in _domains(percent)
    )


def _domains(percent: Percent) -> list[str]:
    return [group for group in percent["all"] if group != JOINT]


def _with(percent: Percent, domain: str) -> list[float]:
    return [row[domain] for label, row in percent.items() if _holds(label, domain)]


def _holds(label: str, domain: str) -> bool:
    """Whether the set that evaluation calls `label` has the domain's expert."""
    if domain == PUBLIC:
        return True
    if label.startswith("all"):
        return label != f"all-{domain}"
    return label == f"public+{domain}"


def _experts(closed: Sequence[Topic]) -> str:
    rows = [["0", f"`{PUBLIC}`", "commons", "Facts for everybody.", ""]]
    for index, topic in enumerate(closed, start=1):
        if topic.owner is not None:
            example = topic.held_out[0].format(subject=topic.facts[0].subject)
            rows.append(
                [str(index), f"`{topic.name}`", topic.owner.name, topic.owner.description, example]
            )
    return _table(["index", "expert", "owner", "holds", "a question for it"], rows)


def _ablation_table(evaluation: dict[str, Any], asked: dict[str, int]) -> str:
    variants: dict[str, Counts] = {"as shipped": evaluation["right"]} | evaluation["ablations"]
    rows = []
    for name, right in variants.items():
        percent = as_percent(right, asked)
        rows.append(
            [name, *_percents(percent["all"]), f"{leak(percent):.1f}", f"{moved(percent):.1f}"]
        )
    return _table(["recipe", *asked, "without", "moves"], rows)


def _percents(row: dict[str, float]) -> list[str]:
    return [f"{value:.1f}" for value in row.values()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
