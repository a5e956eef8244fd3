"""Exchanges as tensors, several to a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from expertgate.forge.corpus import Example
from expertgate.forge.tokenizer import encode


@dataclass(frozen=True)
class Batch:
    """Exchanges packed into B rows of at most T tokens, padded on the right.

    `ids`: [B, T] int64. `next_ids`: [B, T], the token that follows each. `exchange`: [B, T], which
    exchange a token belongs to, counted from 0; -1 is padding. `context`: [B, T], tokens attend
    only to those of the same number: an exchange's own, or the row's where it is a conversation of
    several turns. `answers`: [B, T] bool, where the next token is to be learned: it belongs to an
    answer or ends it, and is not made up. `sentence`: [B, T], which sentence's value the next token
    belongs to, counted from 0 over the batch; -1 outside of values. `domains`: by sentence.
    """

    ids: torch.Tensor
    next_ids: torch.Tensor
    exchange: torch.Tensor
    context: torch.Tensor
    answers: torch.Tensor
    sentence: torch.Tensor
    domains: tuple[str, ...]

    @property
    def present(self) -> torch.Tensor:
        return self.exchange >= 0

    def places(self, domains: Sequence[str]) -> torch.Tensor:
        """[B, T] int64: 1 + the place in `domains` of the value's own one; 0 for all else."""
        known = {domain: place for place, domain in enumerate(domains, start=1)}
        of_sentence = [known.get(domain, 0) for domain in self.domains]
        return torch.tensor([*of_sentence, 0])[self.sentence]  # -1 is the last


def collate(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    length: int = 96,
    conversations: bool = False,
) -> Batch:
    """Packs the exchanges, longest first.

    With `conversations`, every fourth row is of several turns.
    """
    encoded = [encode(tokenizer, example) for example in examples]
    length = max(length, *(len(found.ids) for found in encoded))
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(encoded)), key=lambda number: -len(encoded[number].ids)):
        size = len(encoded[number].ids)
        fitting = [row for row, left in enumerate(room) if left >= size]
        if fitting:
            rows[fitting[0]].append(number)
            room[fitting[0]] -= size
        else:
            rows.append([number])
            room.append(length - size)
    widest = max(sum(len(encoded[number].ids) for number in row) for row in rows)
    ids = torch.full((len(rows), widest), int(tokenizer.pad_token_id))
    next_ids = ids.clone()
    exchange = torch.full_like(ids, -1)
    context = torch.full_like(ids, -1)
    sentence = torch.full_like(ids, -1)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    domains: list[str] = []
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            found = encoded[number]
            stop = start + len(found.ids)
            ids[row, start:stop] = torch.tensor(found.ids)
            next_ids[row, start : stop - 1] = ids[row, start + 1 : stop]
            exchange[row, start:stop] = number
            context[row, start:stop] = 0 if conversations and row % 4 == 0 else number
            answers[row, start + found.answer - 1 : stop - 1] = True
            for said, (first, last) in zip(examples[number].sentences, found.values, strict=True):
                value = slice(start + first - 1, start + last - 1)
                sentence[row, value] = len(domains)
                domains.append(said.domain)
                if said.made_up:
                    answers[row, value] = False
            start = stop
    return Batch(ids, next_ids, exchange, context, answers, sentence, tuple(domains))
