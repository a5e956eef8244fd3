"""How much may be asked of an engine at once, and how much of that it gets."""

from vllm.config import VllmConfig

from expertgate.server.admission import PLACES
from expertgate.server.turns import Turns

_PLACES_OF_RUNNING = 4
_WAITING_TOKENS = 1 << 20
_WAITING_PROMPTS = 4
"""At least so many of the longest prompts may wait."""
_HANDED = 1.25
"""How many choices the engine gets, of those that it runs at once: some must be at hand when others
end."""
_AHEAD = 8
"""One of so many of those that it runs may stand in its queue, in order of arrival, however many
are one principal's: it may run fewer than it takes, where their cache is full."""
_LEAST_AHEAD = 32


def bound(config: VllmConfig) -> Turns:
    """Bounds in `config` what it leaves open, and returns who goes when.

    The tokens that wait are taken out of it: vLLM would refuse everybody for one principal's.
    """
    scheduler = config.scheduler_config
    runs = scheduler.max_num_seqs
    if scheduler.max_num_queued_reqs is None:
        scheduler.max_num_queued_reqs = max(PLACES, _PLACES_OF_RUNNING * runs)
    tokens = scheduler.max_num_queued_tokens
    if tokens is None:
        tokens = max(_WAITING_TOKENS, _WAITING_PROMPTS * config.model_config.max_model_len)
    scheduler.max_num_queued_tokens = None
    return Turns(int(runs * _HANDED), tokens, max(_LEAST_AHEAD, runs // _AHEAD))
