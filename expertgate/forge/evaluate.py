"""Exact-match accuracy."""

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from expertgate.forge.batch import collate
from expertgate.forge.corpus import PUBLIC, Example
from expertgate.forge.network import Shape, Tensors, forward
from expertgate.forge.tokenizer import encode

_BATCH = 64


@torch.no_grad()
def exact(
    shape: Shape,
    shared: Tensors,
    experts: Sequence[Tensors],
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
) -> list[bool]:
    """Whether greedy decoding writes each example's answer, token for token, and then ends.

    It does exactly where every token of the answer, its end included, is the most likely one after
    those before it, so one forward pass over question and answer decides it without generating.
    """
    found: list[bool] = []
    for start in range(0, len(examples), _BATCH):
        chosen = examples[start : start + _BATCH]
        batch = collate(tokenizer, chosen)
        logits = forward(
            shape, shared, experts, batch.ids, context=batch.context, where=batch.answers
        )
        wrong = logits.argmax(dim=-1) != batch.next_ids[batch.answers]
        failed = set(batch.exchange[batch.answers][wrong].tolist())
        found += [number not in failed for number in range(len(chosen))]
    return found


def expert_sets(closed: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets that the evaluation compares, by the name it gives them."""
    sets: dict[str, tuple[str, ...]] = {"public": (PUBLIC,)}
    sets |= {f"public+{name}": (PUBLIC, name) for name in closed}
    sets["all"] = (PUBLIC, *closed)
    for absent in closed:
        sets[f"all-{absent}"] = (PUBLIC, *(name for name in closed if name != absent))
    return sets


def score_sets(
    shape: Shape,
    shared: Tensors,
    experts: dict[str, Tensors],
    tokenizer: PreTrainedTokenizerFast,
    questions: Callable[[Collection[str]], dict[str, list[Example]]],
) -> dict[str, dict[str, int]]:
    """Expert set → group of questions → exact answers, for every set of `expert_sets`.

    `experts` by name, the public one first; `questions` gives what to ask of the experts present,
    by group.
    """
    table: dict[str, dict[str, int]] = {}
    for label, members in expert_sets([name for name in experts if name != PUBLIC]).items():
        present = [experts[name] for name in members]
        table[label] = {
            group: sum(exact(shape, shared, present, tokenizer, asked))
            for group, asked in questions(members).items()
        }
    return table


@torch.no_grad()
def write_answer(
    shape: Shape,
    shared: Tensors,
    experts: Sequence[Tensors],
    tokenizer: PreTrainedTokenizerFast,
    question: str,
    limit: int = 64,
) -> str:
    """The greedy answer of the experts present, of at most `limit` tokens."""
    prompt = encode(tokenizer, Example(question, ()))
    ids = prompt.ids[: prompt.answer]
    for _ in range(limit):
        token = int(forward(shape, shared, experts, torch.tensor([ids]))[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[prompt.answer :]))
