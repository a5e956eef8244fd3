"""Experts that are quantised on disk: the one scheme of which masks are shown to hold.

Their weights are FP8 with a scale for each block of 128 x 128, and a row that is multiplied has
scales of its own, as DeepSeek's checkpoints have it. Nothing but the experts is quantised.
"""

import json

BLOCK = 128
SCALE = "weight_scale_inv"
"""What a weight's scales are called in its place: [R / 128, C / 128] of a weight [R, C]."""

# What `quantization_config` may say, None where it needn't; what is wanted comes first.
_SERVED: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([BLOCK, BLOCK],),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "dequantize": (False, None),
    "modules_to_convert": ([], None),
}
_KEPT = ("ignored_layers", "modules_to_not_convert")  # vLLM looks at the second without the first


def fault(settings: object, num_layers: int) -> str | None:
    """What of a checkpoint's `quantization_config` can't be served, and what could be."""
    if not isinstance(settings, dict):
        return "quantization_config holds no JSON object"
    for name, served in _SERVED.items():
        if settings.get(name) not in served:
            return (
                f"quantization_config.{name} is {json.dumps(settings.get(name))}, but this server "
                f"serves {json.dumps(served[0])}: of what is quantised, masks are shown to hold "
                f"for experts in FP8 by blocks of {BLOCK}, each row with scales of its own"
            )
    if strange := sorted(settings.keys() - _SERVED.keys() - set(_KEPT)):
        return (
            f"quantization_config.{strange[0]} isn't among what can be served, which is "
            f"{', '.join([*_SERVED, *_KEPT])}"
        )
    given = next((name for name in _KEPT if settings.get(name)), _KEPT[1])
    kept = settings.get(given) or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        return f"quantization_config.{given} must be a list of names"
    for layer in range(num_layers):
        for part in "qkvo":
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            if name not in kept:
                return (
                    f"quantization_config.{given} doesn't name {name}: only experts may be "
                    "quantised, and each projection of attention must be named in full"
                )
    for name in kept:
        if "experts" in name:
            return f"quantization_config.{given} names {name}: all experts must be quantised"
    return None
