"""Settings under which a mask would not hold are refused before the server starts, by name.

Three looks: at the process (environment, installed plug-ins), at the engine arguments as given,
against a list of those that were vetted, and at what vLLM made of them. The last is needed
because vLLM derives settings from others, from the model's files and from the platform.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from expertgate.model.checkpoint import ARCHITECTURE
from expertgate.model.moe_kernel import KERNELS
from expertgate.model.quantised import BLOCK

OUR_PLUGIN = "expertgate"
OUR_PLUGIN_VALUE = "expertgate.model.plugin:register"

_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.endpoint_plugins",
    "vllm.io_processor_plugins",
)

_FALSE = ("", "0", "false")


def _is_off(value: str) -> bool:
    return value.lower() in _FALSE


# Environment variable → which of its values were vetted, and why no other is.
_ENVIRONMENT: dict[str, tuple[Callable[[str], bool], str]] = {
    "VLLM_PLUGINS": (
        lambda value: value == OUR_PLUGIN,
        f"may only be {OUR_PLUGIN!r}: other plug-ins run inside the engine",
    ),
    "VLLM_USE_V2_MODEL_RUNNER": (
        lambda value: not _is_off(value),
        "may not be 0: the other GPU runner knows no masks",
    ),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": (
        _is_off,
        "may not be set: an adapter carries data that no grant names",
    ),
    "VLLM_ALLOW_INSECURE_SERIALIZATION": (
        _is_off,
        "may not be set: it lets a message to the engine carry code",
    ),
    "VLLM_MODEL_REDIRECT_PATH": (
        lambda value: value == "",
        "may not be set: other weights would be served than those that the catalogue names",
    ),
    "VLLM_USE_MODELSCOPE": (
        lambda value: _is_off(value.strip()),
        "may not be set: files would come from elsewhere than those that were checked",
    ),
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": (
        _is_off,
        "may not be set: ids that repeat would let one request end another",
    ),
    "VLLM_ENABLE_RESPONSES_API_STORE": (
        lambda value: _is_off(value.strip()),
        "may not be set: the store asks nobody whose a response is",
    ),
    "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT": (
        lambda value: _is_off(value.strip()),
        "may not be set: it runs tools, and the engine again, within one request",
    ),
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": (
        lambda value: _is_off(value.strip()),
        "may not be set: behind a model's last position it reads what else lies in memory",
    ),
    "VLLM_RAISE_ON_LOGIT_NANS": (
        lambda value: value.strip() == "0",
        "may not be set: one request whose numbers are broken would end the engine for all",
    ),
    "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": (
        lambda value: value.strip().isdecimal() and int(value) >= 1024,
        "may not be less than 1024: a request's bad words may be as long, and would end the engine",
    ),
    "VLLM_SKIP_MODEL_NAME_VALIDATION": (
        _is_off,
        "may not be set: a misspelt alias would be served as if it were right",
    ),
}


class SettingError(ValueError):
    """A setting that this server does not start with; one line that names it and says why."""


def _any(_: object) -> bool:
    return True


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: value in values


_VETTED_NGRAM = {"method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"}


def _ngram(value: object) -> bool:
    """Which drafts there are; not whether they are taken unseen (`rejection_sample_method`)."""
    return (
        isinstance(value, Mapping)
        and value.get("method") == "ngram"
        and set(value) <= _VETTED_NGRAM
    )


_VETTED_COMPILATION = {
    "mode",
    "cudagraph_mode",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "compile_sizes",
    "cache_dir",
}


def _compilation(value: object) -> bool:
    """Levels, graphs and sizes; not code by name (`backend`, passes), not another split."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, Mapping) and set(value) <= _VETTED_COMPILATION


# Without scales that are taken from what lies in the cache.
_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

FP8_EXPERTS = {"moe": "fp8_per_block"}
"""The quantisation of which masks are shown to hold: by vLLM, of the experts, while it loads them.

Each row has scales of its own there. One for a whole batch would let neighbours show. Experts that
are FP8 on disk by the same scheme (`expertgate.model.quantised`) run in the same kernel.
"""


def _is_vetted_quantization(config: Any) -> bool:
    """Whether what vLLM made of its arguments and the checkpoint is none, or FP8 by blocks.

    Which layers are FP8 on disk `Checkpoint` has looked at.
    """
    layers = config.quant_config
    if config.model_config.quantization is None:
        return layers is None
    if config.model_config.quantization == "fp8":
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        return (
            type(layers) is Fp8Config
            and layers.weight_block_size == [BLOCK, BLOCK]
            and layers.activation_scheme == "dynamic"
            and layers.store_dtype is None
            and layers.online_quantization_config is None
        )
    from vllm.config.quantization import resolve_quantization_config

    vetted = resolve_quantization_config("online", FP8_EXPERTS)
    return config.model_config.quantization == "online" and getattr(layers, "args", None) == vetted


# Engine argument → which of its values were vetted, and how to say so.
_VETTED: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        (
            # What is served, and from where
            "served_model_name",
            "tokenizer",
            "tokenizer_revision",
            "revision",
            "hf_token",
            "download_dir",
            "max_parallel_loading_workers",
            "use_tqdm_on_load",
            "dtype",
            "seed",
            # Room and batches
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "long_prefill_token_threshold",
            "enable_chunked_prefill",
            "block_size",
            "num_gpu_blocks_override",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "enable_prefix_caching",
            "stream_interval",
            "async_scheduling",
            # Execution
            "enforce_eager",
            "cudagraph_capture_sizes",
            "max_cudagraph_capture_size",
            "attention_backend",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "disable_custom_all_reduce",
            "master_addr",
            "master_port",
            "nnodes",
            "node_rank",
            "distributed_timeout_seconds",
            "disable_log_stats",
        ),
        (_any, ""),
    ),
    "compilation_config": (
        _compilation,
        ", ".join(sorted(_VETTED_COMPILATION)),
    ),
    "distributed_executor_backend": (_one_of("mp", "ray", "uni"), "mp, ray or uni"),
    "generation_config": (_one_of("auto", "vllm"), "auto or vllm"),
    "kv_cache_dtype": (_one_of(*_KV_CACHE_DTYPES), ", ".join(_KV_CACHE_DTYPES)),
    "load_format": (_one_of("auto", "safetensors"), "auto or safetensors"),
    "logprobs_mode": (
        _one_of("raw_logprobs", "processed_logprobs"),
        "raw_logprobs or processed_logprobs",
    ),
    # Those of a whole vocabulary are made into text on everybody's event loop, for minutes.
    "max_logprobs": (lambda value: value != -1, "a number from 0, as -1 sets no bound,"),
    "model_impl": (_one_of("auto", "vllm"), "auto or vllm"),
    "moe_kernel": (_one_of(*KERNELS), " or ".join(KERNELS)),  # ours, not vLLM's own argument
    "prefix_caching_hash_algo": (_one_of("sha256", "sha256_cbor"), "sha256 or sha256_cbor"),
    "quantization": (_one_of("online"), f"online, with quantization_config={FP8_EXPERTS},"),
    "quantization_config": (_one_of(FP8_EXPERTS), str(FP8_EXPERTS)),
    "runner": (_one_of("auto", "generate"), "generate"),
    "scheduling_policy": (_one_of("fcfs"), "fcfs"),
    "speculative_config": (
        _ngram,
        f"the method ngram, with {', '.join(sorted(_VETTED_NGRAM - {'method'}))}",
    ),
    "tokenizer_mode": (_one_of("auto", "hf"), "auto or hf"),
}

_OWN = "it is the server's own: name it before the `--`, or beside `engine:`"
# Why some of the others are not on the list; the rest have no test that shows the masks hold.
_WHY: dict[str, str] = {
    "host": _OWN,
    "port": _OWN,
    "data_parallel_size": "no test shows yet that masks hold across data-parallel ranks",
    "enable_dbo": "micro-batches slice only the inputs they know, and masks are not among them",
    "enable_elastic_ep": "it moves expert weights between ranks, and ids don't follow",
    "enable_eplb": "it moves expert weights between slots, and ids don't follow",
    "enable_expert_parallel": "no test shows yet that masks hold across expert-parallel ranks",
    "enable_lora": "an adapter carries data that no grant names",
    "enable_prompt_embeds": "a prompt of embeddings can't be audited",
    "enable_return_routed_experts": "it hands whole routing traces to clients",
    "enable_sleep_mode": "it does not restore the masks",
    "hf_overrides": "it can put another model in the place of the masked one",
    "kv_events_config": "it publishes every tenant's tokens",
    "kv_offloading_size": "blocks would leave the salted cache",
    "kv_transfer_config": "a connector may hand on blocks without asking for their salt",
    "logits_processors": "a stranger's code would see every request",
    "prefill_context_parallel_size": "it slices only the inputs it knows, and masks are not among "
    "them",
    "quantization": "other kernels may take one scale for a whole batch, by which neighbours show",
    "scheduler_cls": "the scheduler must be vLLM's own",
    "trust_remote_code": "the checkpoint's own code would run in the engine",
    "ubatch_size": "micro-batches slice only the inputs they know, and masks are not among them",
    "worker_cls": "the worker is chosen by the server, and must be the one that knows masks",
    "worker_extension_cls": "the worker must be the one that knows masks, and nothing more",
}


def refuse_process(environment: Mapping[str, str] = os.environ) -> None:
    """Looks at environment and installed plug-ins, before vLLM is imported. Raises SettingError."""
    for name, (vetted, why) in _ENVIRONMENT.items():
        value = environment.get(name)
        if value is not None and not vetted(value):
            raise SettingError(f"environment variable {name}={value}: {why}")
    # vLLM loads these without looking at VLLM_PLUGINS.
    for foreign in entry_points(group="vllm.logits_processors"):
        raise SettingError(
            f"plug-in {foreign.name!r} (vllm.logits_processors, {_origin(foreign)}) is "
            "installed, and vLLM would load it into the engine: uninstall it"
        )
    for group in _PLUGIN_GROUPS:
        for point in entry_points(group=group, name=OUR_PLUGIN):
            if (group, point.value) != ("vllm.general_plugins", OUR_PLUGIN_VALUE):
                raise SettingError(
                    f"plug-in {point.value!r} ({group}, {_origin(point)}) takes the name "
                    f"{OUR_PLUGIN!r}: uninstall it"
                )


def refuse_arguments(arguments: Mapping[str, object]) -> None:
    """Looks at engine arguments as given, by their Python names. Raises SettingError."""
    for name, value in arguments.items():
        if name not in _VETTED:
            raise SettingError(f"engine argument {name}: {_why_no_argument(name)}")
        vetted, values = _VETTED[name]
        if not vetted(value):
            raise SettingError(f"engine argument {name}={value}: only {values} can be served")


def refuse_config(config: Any, worker_cls: str, model_path: str, tokenizer: str) -> None:
    """Looks at the VllmConfig that vLLM made of our `worker_cls`, the two paths and the arguments.

    Raises SettingError.
    """
    for name, unsafe in _unsafe(config, worker_cls).items():
        if unsafe:
            raise SettingError(f"engine setting {name}: {_why_no_setting(name)}")
    model = config.model_config
    for what, found, asked in (
        ("model", model.model, model_path),
        ("tokenizer", model.tokenizer, tokenizer),
    ):
        if found != asked:
            raise SettingError(f"vLLM would load the {what} {found!r} in the place of {asked!r}")
    architectures = list(model.hf_config.architectures or [])
    if architectures != [ARCHITECTURE]:
        raise SettingError(f"the model's architecture is {architectures}, not {ARCHITECTURE}")


def _unsafe(config: Any, worker_cls: str) -> dict[str, bool]:
    """Setting, as vLLM calls it → whether it has a value under which a mask may not hold."""
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    scheduler, speculative = config.scheduler_config, config.speculative_config
    return {
        "enable_eplb": parallel.enable_eplb,
        "enable_elastic_ep": parallel.enable_elastic_ep,
        "enable_expert_parallel": parallel.enable_expert_parallel,
        "data_parallel_size": parallel.data_parallel_size > 1,
        "enable_dbo": parallel.enable_dbo,
        "ubatch_size": parallel.ubatch_size > 0,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "worker_cls": parallel.worker_cls != worker_cls,
        "worker_extension_cls": bool(parallel.worker_extension_cls),
        "enable_lora": config.lora_config is not None,
        "kv_transfer_config": config.kv_transfer_config is not None,
        "kv_events_config": config.kv_events_config is not None
        and config.kv_events_config.enable_kv_cache_events,
        "ec_transfer_config": config.ec_transfer_config is not None,
        "weight_transfer_config": config.weight_transfer_config is not None,
        "diffusion_config": config.diffusion_config is not None,
        "watermark_config": config.watermark_config is not None,
        "kv_offloading_size": bool(cache.kv_offloading_size),
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "prefix_caching_hash_algo": cache.prefix_caching_hash_algo not in ("sha256", "sha256_cbor"),
        "speculative_config": speculative is not None
        and not (
            speculative.method == "ngram" and speculative.rejection_sample_method == "standard"
        ),
        "scheduling_policy": scheduler.policy != "fcfs",
        "scheduler_cls": not _is_vllms(scheduler.scheduler_cls),
        "enable_sleep_mode": model.enable_sleep_mode,
        "logits_processors": bool(model.logits_processors),
        "io_processor_plugin": bool(model.io_processor_plugin),
        "model_impl": str(getattr(model.model_impl, "value", model.model_impl))
        not in ("auto", "vllm"),
        "model_class_overrides": bool(model.model_class_overrides),
        "hf_overrides": bool(model.hf_overrides),
        "runner": model.runner_type != "generate",
        "enable_prompt_embeds": model.enable_prompt_embeds,
        "trust_remote_code": model.trust_remote_code,
        "quantization": not _is_vetted_quantization(config),
        "enable_trace_replay": model.enable_trace_replay,
        "return_sampling_mask": model.return_sampling_mask,
        "enable_return_routed_experts": config.aux_output_config.enable_return_routed_experts,
    }


def _why_no_setting(name: str) -> str:
    """Of a setting as vLLM calls it."""
    if name in _WHY:
        return f"refused, because {_WHY[name]}"
    if name in _VETTED:
        return f"only {_VETTED[name][1]} can be served"
    return "refused, because no test shows that masks hold where it is on"


def _why_no_argument(name: str) -> str:
    """Of an argument as somebody wrote it."""
    if name in _WHY:
        return f"refused, because {_WHY[name]}"
    if near := difflib.get_close_matches(name, _VETTED, n=1):
        return f"not one of those that can be served; did you mean {near[0]}?"
    return f"not one of those that can be served, which are {', '.join(sorted(_VETTED))}"


def _is_vllms(scheduler: str | type[object] | None) -> bool:
    if scheduler is None:
        return True
    name = scheduler if isinstance(scheduler, str) else scheduler.__module__
    return name.startswith("vllm.")


def _origin(point: EntryPoint) -> str:
    return f"from {point.dist.name}" if point.dist is not None else "of unknown origin"
