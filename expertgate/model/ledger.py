"""Counts, in the worker, what the masked router sent to each expert for each account.

An account is one call to the engine with all of its choices, under a name that the server made and
wrote into their parameters. Only totals are kept; they leave when the server closes the account.

Dimensions: T tokens of a step, L MoE layers of this rank, E experts, K = top_k slots, A accounts.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.utils.torch_utils import async_tensor_h2d

from expertgate.kernels import NO_EXPERT, RoutingPlan, route
from expertgate.model.usage import WEIGHT_UNIT, Work

log = logging.getLogger(__name__)

ACCOUNT_ARG = "expertgate_account"
"""The key of `SamplingParams.extra_args` under which the guarded engine names the account."""

_NOBODY = 0  # the row of the totals that takes what isn't counted
_ROWS_AT_FIRST = 64
_MAX_ACCOUNTS = 1 << 16
_ROUTED_AT_ONCE = 1 << 14  # (token, layer) pairs; bounds the scratch memory of a long prefill


class Scheduled(NamedTuple):
    """One request's part of a step: `length` tokens at the positions from `start` on."""

    request_id: str
    account: str | None
    start: int
    length: int


@dataclass(slots=True)
class _Account:
    row: int
    computed: int = 0
    cached: int = 0
    # Engine's request id → the position up to which it is accounted for. It outlives a preemption.
    reached: dict[str, int] = field(default_factory=dict)


def account_of(extra_args: Mapping[str, Any] | None) -> str | None:
    """The account that the guarded engine named; None, so uncounted, where it named none."""
    account = (extra_args or {}).get(ACCOUNT_ARG)
    return account if isinstance(account, str) else None


class Ledger:
    """Totals by account, made from the logits that the layers routed by.

    While a step runs, each layer only copies its masked logits into `logits`, which has one address
    for life, as a replayed CUDA graph wants it; or the model gives their plans as `routed`, and
    nothing is copied. `settle` then puts the step aside. Once as many tokens are there as the
    largest step has, or a total is asked for, logits are routed once more, all steps and layers
    together, through the very function that the router uses, and integers are added up: no order of
    additions changes a total, and nothing here can change an answer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        max_tokens: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        device: torch.device,
    ) -> None:
        self.logits = torch.zeros(
            (num_layers, max_tokens, num_experts), dtype=torch.float32, device=device
        )
        """[L, T, E]: what the layers write, each its own part."""
        self.routed: RoutingPlan | None = None
        """Of the step [L, T, K], where the layers write nothing; tensors that nobody changes."""
        self._aside: list[torch.Tensor | RoutingPlan] = []
        self._aside_rows: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._num_aside = 0
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._top_k = top_k
        self._renormalize = renormalize
        self._totals = torch.empty((2, 0, num_experts + 1), dtype=torch.int64, device=device)
        """[2, A, 1 + E]: slots, and weights in 1/WEIGHT_UNIT; first what went to no expert."""
        self._free: list[int] = []
        self._accounts: dict[str, _Account] = {}
        self._step: np.ndarray[Any, np.dtype[np.int64]] | None = None  # [T], its account's row
        self._grow(_ROWS_AT_FIRST)

    def begin(self, step: Iterable[Scheduled]) -> None:
        """Notes who a step's tokens belong to, in the order of the batch; padding follows them.

        A position counts when it is computed first: what a preemption repeats is left out. One
        that is passed over came from the prefix cache.
        """
        self.settle()
        rows: list[int] = []
        lengths: list[int] = []
        for request_id, name, start, length in step:
            if name is None:
                rows.append(_NOBODY)
                lengths.append(length)
                continue
            account = self._accounts.get(name) or self._open(name)
            reached = account.reached.get(request_id, 0)
            if start != reached:
                repeated = min(max(reached - start, 0), length)
                if repeated:
                    rows.append(_NOBODY)
                    lengths.append(repeated)
                account.cached += max(start - reached, 0)
                start, length = start + repeated, length - repeated
            rows.append(account.row)
            lengths.append(length)
            account.computed += length
            account.reached[request_id] = max(reached, start + length)
        self._step = np.repeat(np.array(rows, dtype=np.int64), lengths)

    def settle(self) -> None:
        """Puts the step that was begun last aside, once it has run; nothing where none is open."""
        rows, self._step = self._step, None
        routed, self.routed = self.routed, None
        if rows is None or not len(rows):
            return
        if self._num_aside + len(rows) > self.logits.shape[1]:
            self._add_up()
        # The next step's logits are written to the same place.
        self._aside.append(self.logits[:, : len(rows)].clone() if routed is None else routed)
        self._aside_rows.append(rows)
        self._num_aside += len(rows)

    @torch.inference_mode()
    def _add_up(self) -> None:
        """Adds what is aside to the totals."""
        if not self._num_aside:
            return
        # Few operations on purpose: each takes longer to begin than it has to do here.
        columns = self._totals.shape[2]
        firsts = np.concatenate(self._aside_rows) * columns - NO_EXPERT
        cells_at = async_tensor_h2d(firsts, device=self.logits.device)[:, None]
        slots, weights = self._totals.view(2, -1)
        for plan in self._plans_aside():
            layers = len(plan.experts) // len(firsts)
            cells = (plan.experts.view(layers, len(firsts), -1) + cells_at).flatten()
            # Exact: a float32 times a power of two is one, and so is its rounding.
            units = (plan.weights * WEIGHT_UNIT).round_().to(torch.int64)
            slots.index_add_(0, cells, self._one.expand(len(cells)))
            weights.index_add_(0, cells, units.flatten())
        self._aside, self._aside_rows, self._num_aside = [], [], 0

    def _plans_aside(self) -> Iterator[RoutingPlan]:
        """Of all tokens that are aside, in one layer and then the next; some layers at a time."""
        at_once = max(1, _ROUTED_AT_ONCE // self._num_aside)
        logits, weights, experts = [], [], []
        for step, rows in zip(self._aside, self._aside_rows, strict=True):
            if isinstance(step, torch.Tensor):
                logits.append(step)
            else:
                padded = step.experts.shape[1] > len(rows)
                weights.append(step.weights[:, : len(rows)] if padded else step.weights)
                experts.append(step.experts[:, : len(rows)] if padded else step.experts)
        if logits:
            for part in torch.split(torch.cat(logits, 1), at_once):
                yield route(
                    part.flatten(0, 1), None, top_k=self._top_k, renormalize=self._renormalize
                )
        else:
            both = (torch.split(torch.cat(parts, 1), at_once) for parts in (weights, experts))
            for chosen in zip(*both, strict=True):
                yield RoutingPlan(*(part.flatten(0, 1) for part in chosen))

    @torch.inference_mode()
    def close(self, accounts: Sequence[str]) -> list[Work]:
        """The totals of accounts whose requests have ended, which are forgotten.

        An account that no step has seen has done nothing.
        """
        self.settle()
        self._add_up()
        closed = [self._accounts.pop(name, None) for name in accounts]
        rows = [account.row for account in closed if account is not None]
        where = torch.tensor(rows, dtype=torch.int64, device=self.logits.device)
        counted = zip(*self._totals[:, where, 1:].tolist(), strict=True)
        self._totals[:, where] = 0
        self._free += rows
        nothing = (0,) * self.logits.shape[-1]
        layers = len(self.logits)
        works = []
        for account in closed:
            if account is None:
                works.append(Work(layers, 0, 0, nothing, nothing))
            else:
                slots, weights = map(tuple, next(counted))
                works.append(Work(layers, account.computed, account.cached, slots, weights))
        return works

    def _open(self, name: str) -> _Account:
        if len(self._accounts) >= _MAX_ACCOUNTS:
            # The server closes each account, so these are what it lost the sight of.
            self.close([next(iter(self._accounts))])
            log.error("an account was never closed; its usage is lost")
        if not self._free:
            self._grow(2 * self._totals.shape[1])
        account = self._accounts[name] = _Account(self._free.pop())
        return account

    @torch.inference_mode()
    def _grow(self, rows: int) -> None:
        """Makes room for accounts, up to so many rows in all."""
        had, columns = self._totals.shape[1:]
        grown = self._totals.new_zeros((2, rows, columns))
        grown[:, :had] = self._totals
        self._totals = grown
        self._free += range(rows - 1, max(had, _NOBODY + 1) - 1, -1)


class ReportsUsage:
    """Mixed into the workers; called over vLLM's `collective_rpc`."""

    model_runner: Any

    def expertgate_usage(self, accounts: list[str]) -> list[tuple[Any, ...]] | None:
        """Closes these accounts: the fields of each one's `Work`, in the same order.

        A pipeline rank tells of its own layers. Tensor ranks all route the same, so the first of
        them tells, and the others give None.
        """
        works = self.model_runner.get_model().ledger.close(accounts)
        if get_tensor_model_parallel_rank() != 0:
            return None
        return [(w.layers, w.computed, w.cached, w.slots, w.weights) for w in works]
