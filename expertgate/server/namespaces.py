"""Under which salts prefixes may be cached, and what was asked when they were."""

from collections import OrderedDict
from collections.abc import Callable

from expertgate.policies.context import Context
from expertgate.policies.decision import Decision
from expertgate.policies.expert_set import PUBLIC_ONLY, ExpertSet
from expertgate.policies.principal import Principal

_MANY = 4096


class Namespaces:
    """The principals and expert sets that have been granted, each with what was asked last.

    Whoever isn't here when policies change may come back, when they change again, to a prefix that
    was cached before the first change; so the server forgets what is cached for the experts that
    any of these lose.
    """

    def __init__(self) -> None:
        self._asked: OrderedDict[tuple[str, ExpertSet], tuple[Principal, Context]] = OrderedDict()
        self._complete = True

    def note(self, principal: Principal, context: Context, experts: ExpertSet) -> None:
        key = (principal.id, experts)
        self._asked[key] = (principal, context)
        self._asked.move_to_end(key)
        if len(self._asked) > _MANY:
            self._asked.popitem(last=False)
            self._complete = False

    def losses(
        self, decide: Callable[[Principal, Context], Decision], every: ExpertSet
    ) -> ExpertSet:
        """The experts that somebody here would not be granted now.

        Where not everybody is here any more: `every` one but the public.
        """
        if not self._complete:
            self._complete = True
            return every - PUBLIC_ONLY
        lost = ExpertSet(0)
        for (_, experts), (principal, context) in list(self._asked.items()):
            lost |= experts - decide(principal, context).granted
        return lost
