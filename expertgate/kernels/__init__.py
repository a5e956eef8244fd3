"""The masked mixture-of-experts layer. torch and triton alone.

`masked_moe` is the layer, `route` its routing; `reference` holds the obvious loop that both equal.
"""

from expertgate.kernels.checks import InputError
from expertgate.kernels.cpu import Packed, pack
from expertgate.kernels.dispatch import mask_logits, masked_moe, route
from expertgate.kernels.routing import NO_EXPERT, RoutingPlan

__all__ = [
    "NO_EXPERT",
    "InputError",
    "Packed",
    "RoutingPlan",
    "mask_logits",
    "masked_moe",
    "pack",
    "route",
]
