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
    several turns. `answers`: [B, T] bool, where the next token belongs to an answer or ends it.
    `values`: [B, T] bool, of these the ones past the words that restate the question.
    """

    ids: torch.Tensor
    next_ids: torch.Tensor
    exchange: torch.Tensor
    context: torch.Tensor
    answers: torch.Tensor
    values: torch.Tensor

    @property
    def present(self) -> torch.Tensor:
        return self.exchange >= 0


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
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(encoded)), key=lambda number: -len(encoded[number][0])):
        size = len(encoded[number][0])
        fitting = [row for row, left in enumerate(room) if left >= size]
        if fitting:
            rows[fitting[0]].append(number)
            room[fitting[0]] -= size
        else:
            rows.append([number])
            room.append(max(length, size) - size)
    widest = max(sum(len(encoded[number][0]) for number in row) for row in rows)
    ids = torch.full((len(rows), widest), int(tokenizer.pad_token_id))
    next_ids = ids.clone()
    exchange = torch.full_like(ids, -1)
    context = torch.full_like(ids, -1)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    values = torch.zeros_like(answers)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            tokens, answer, value = encoded[number]
            stop = start + len(tokens)
            ids[row, start:stop] = torch.tensor(tokens)
            next_ids[row, start : stop - 1] = ids[row, start + 1 : stop]
            exchange[row, start:stop] = number
            context[row, start:stop] = 0 if conversations and row % 4 == 0 else number
            answers[row, start + answer - 1 : stop - 1] = True
            values[row, start + value - 1 : stop - 1] = True
            start = stop
    return Batch(ids, next_ids, exchange, context, answers, values)
