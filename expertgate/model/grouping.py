"""A scheduler of vLLM's that admits requests of one expert set together, as far as none waits long.

At decode a step costs what the distinct experts of its batch cost, so a batch of one small set is
cheaper than one that has somebody of every set in it. Only the order of admission changes: what is
computed for a request doesn't depend on who is beside it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from expertgate.model.masks import requested


class Lift:
    """Who is admitted next: one set after the other, as a lift serves one floor after the other.

    `patience`: how many steps a request may wait behind its turn, which is when it would have gone
    in first come, first served. Then it goes first, and its set is the next that is served.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._set = 0
        self._seen = 0
        self._waits: dict[str, tuple[int, int | None]] = {}

    def choose(self, waiting: Sequence[tuple[str, int]], free: int, step: int) -> list[int]:
        """Places in `waiting`, (id, mask) in order of arrival, of the `free` that go in now."""
        waits = {}
        for name, _ in waiting:
            if name not in self._waits:
                self._waits[name] = self._seen, None
                self._seen += 1
            waits[name] = self._waits[name]
        turn = self._seen - len(waiting) + free
        due: list[int] = []
        rest: list[int] = []
        for place, (name, _) in enumerate(waiting):
            number, since = waits[name]
            if since is None and number < turn:
                waits[name] = number, since = number, step
            (due if since is not None and step - since >= self.patience else rest).append(place)
        self._waits = waits
        masks = [mask for _, mask in waiting]
        if due:
            self._set = masks[due[0]]
        elif self._set not in masks:
            [(self._set, _)] = Counter(masks).most_common(1)
        rest.sort(key=lambda place: ((masks[place] ^ self._set).bit_count(), place))
        return sorted((due + rest)[:free])


class GroupingScheduler(AsyncScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lift = Lift(int(self.vllm_config.additional_config["expertgate_patience"]))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        free = self.max_num_running_reqs - len(self.running)
        if free > 0 and self.waiting and self.lift.patience:
            waiting: list[Request] = list(self.waiting)
            asked = [(r.request_id, requested(r.sampling_params.extra_args).mask) for r in waiting]
            chosen = self.lift.choose(asked, free, self.current_step)
            self.waiting.remove_requests([waiting[place] for place in chosen])
            for place in reversed(chosen):
                self.waiting.prepend_request(waiting[place])
        return super().schedule(*args, **kwargs)
