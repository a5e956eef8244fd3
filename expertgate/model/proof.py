"""What a worker can say of itself, for the server to check before it is ready."""

from typing import Any

from expertgate.model.flex_olmo import FlexOlmoForCausalLM


class ProvesMasks:
    """Mixed into the workers; called over vLLM's `collective_rpc`."""

    model_runner: Any

    def expertgate_facts(self) -> dict[str, str]:
        """Part → full name of the class that this worker runs as that part.

        Every part is one where masks are made or read, so each must be a class of this package; but
        the kernel, which gets what they leave, may be vLLM's. A layer whose kernel would route by
        itself, from raw logits, says `monolithic` before its experts.
        """
        runner = self.model_runner
        model = runner.get_model()
        facts = {"worker": _name(self), "model": _name(model)}
        # Model Runner V2 keeps masks in the model's state; V1 has no such thing, and a subclass.
        keeper = "model_state" if hasattr(runner, "model_state") else "model_runner"
        facts[keeper] = _name(getattr(runner, keeper, runner))
        if isinstance(model, FlexOlmoForCausalLM):
            for layer in model.moe_layers:
                facts[f"{layer.prefix} router"] = _name(layer.experts.router)
                kind = "monolithic " if layer.experts.is_monolithic else ""
                experts = layer.experts.routed_experts
                facts[f"{layer.prefix} experts"] = kind + _name(experts)
                facts[f"{layer.prefix} kernel"] = _name(experts.kernel)
        return facts


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
