"""From a model folder and vLLM's own arguments to a guarded engine that has proved itself."""

import argparse
import json
import os
import secrets
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from pydantic import ValidationError
from vllm import ModelRegistry
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from expertgate.model import cpu_process
from expertgate.model.checkpoint import ARCHITECTURE, Checkpoint
from expertgate.model.cpu_dense import least_rows
from expertgate.model.flex_olmo import FlexOlmoForCausalLM
from expertgate.model.moe_kernel import DEFAULT, OPTION
from expertgate.model.quantised import BLOCK
from expertgate.server.cache_salts import CacheSalts
from expertgate.server.failures import EngineError
from expertgate.server.grants import Grants
from expertgate.server.guard import GuardedLLM
from expertgate.server.machine import (
    check_c_compiler,
    check_cpp_compiler,
    check_free,
    check_kernels,
    check_memory,
)
from expertgate.server.newcomers import first_tokens_first
from expertgate.server.refusals import (
    FP8_EXPERTS,
    SettingError,
    refuse_arguments,
    refuse_config,
)
from expertgate.server.room import bound

CPU_WORKER = "expertgate.model.cpu_worker.MaskedCPUWorker"
GPU_WORKER = "expertgate.model.gpu_worker.MaskedGPUWorker"


def parse_flags(flags: Sequence[str]) -> dict[str, object]:
    """Those of vLLM's own flags, and of ours, that were given, by Python names.

    Raises SettingError.
    """
    if not flags:
        return {}
    if any(flag.partition("=")[0] == "--config" for flag in flags):
        # vLLM's parser would read more arguments from that file.
        raise SettingError(
            "engine argument --config: write vLLM's arguments under `engine:` in the configuration"
        )
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False))
    parser.add_argument("--moe-kernel")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest in ("compilation_config", "quantization_config"):
            # As in a configuration: what was given shows, which vLLM's object no longer tells.
            action.type = _json
    return dict(vars(parser.parse_args(list(flags))))


def configure(model: Path, name: str, arguments: Mapping[str, object]) -> VllmConfig:
    """The engine's configuration, without starting anything.

    `name` is what the model is called, unless `served_model_name` is among `arguments`. Raises
    SettingError for what vLLM, this machine or the masks don't admit.
    """
    refuse_arguments(arguments)
    load_general_plugins()
    # Of a class that has only a name, vLLM asks another process what it can, which takes seconds.
    ModelRegistry.register_model(ARCHITECTURE, FlexOlmoForCausalLM)
    worker = _worker()
    kernel = arguments.get("moe_kernel", DEFAULT)
    if kernel == "expertgate" and worker == CPU_WORKER:
        raise SettingError(
            "engine argument moe_kernel=expertgate: those kernels are for NVIDIA GPUs"
        )
    given: dict[str, Any] = {
        "served_model_name": name,
        "use_tqdm_on_load": False,
        **_seed(arguments),
        **_quantization(arguments, kernel),
        **arguments,
        # The first request would choose it for all, and others compile what a client sends.
        "structured_outputs_config": {"backend": "xgrammar"},
        # With "auto", weights of another format would be taken before those that were checked.
        "load_format": "safetensors",
        "model": str(model),
        "worker_cls": worker,
        "additional_config": {OPTION: kernel},
    }
    given.pop("moe_kernel", None)
    if worker == CPU_WORKER and cpu_process.is_alone(arguments):
        given["distributed_executor_backend"] = cpu_process.EXECUTOR
    try:
        # By this vLLM chooses how large batches may be, where nobody says.
        config = AsyncEngineArgs(**given).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        raise SettingError(_named(error, arguments)) from None
    except Exception as error:  # vLLM raises a dozen kinds here; each says what doesn't fit
        raise SettingError(f"engine arguments: {_first_line(error)}") from None
    refuse_config(config, worker, str(model), str(arguments.get("tokenizer") or model))
    if config.model_config.quantization == "fp8":
        _check_quantised(Checkpoint(model), kernel, config.parallel_config.tensor_parallel_size)
    _check_tokenizer(config.model_config)
    headers = Path(sysconfig.get_path("include"))
    if worker == CPU_WORKER:
        check_kernels()
        check_memory(Checkpoint(model), psutil.virtual_memory().available)
        _check_batch(config)
        check_cpp_compiler(os.environ, headers)
        return config
    check_c_compiler(os.environ, headers)
    if not config.use_v2_model_runner:
        raise SettingError(
            "vLLM would not run Model Runner V2, which holds the masks, but its older one: it "
            "finds no Triton that works with this GPU"
        )
    return config


def start(model: Path, name: str, arguments: Mapping[str, object], grants: Grants) -> GuardedLLM:
    """Starts vLLM's processes. Blocks for half a minute or so.

    Raises SettingError as `configure` does, or EngineError.
    """
    config = configure(model, name, arguments)
    if current_platform.is_cpu():
        # Not in `configure`, because a server that runs beside a check may have taken it.
        check_free(config.cache_config)
    turns = bound(config)
    try:
        with cpu_process.openmp(config):
            engine = AsyncLLM(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=not arguments.get("disable_log_stats", False),
                log_requests=False,
            )
    except Exception as error:
        raise EngineError(
            f"the engine did not start: {_first_line(error)} (if it lacked memory: lower "
            "max_model_len, max_num_seqs or kv_cache_memory_bytes under `engine:`)"
        ) from error
    first_tokens_first(engine)
    # The epoch counts changes of the weights while the process runs; nothing changes them yet.
    salts = CacheSalts(weights=f"{model} epoch 0".encode())
    return GuardedLLM(engine, grants, salts, turns)


def _named(error: ValidationError, arguments: Mapping[str, object]) -> str:
    """What is wrong with which argument; of several, with one that was given."""
    faults = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    name, what = next((fault for fault in faults if fault[0] in arguments), faults[0])
    what = _first_line(what).removeprefix("Value error, ")
    if not name:  # of several together
        return f"engine arguments: {what}"
    value = f"={arguments[name]}" if name in arguments else ""
    return f"engine argument {name}{value}: {what}"


def _seed(arguments: Mapping[str, object]) -> dict[str, int]:
    """By which requests without a seed of their own draw; vLLM's own is 0 in every server.

    Whoever knows it can tell from their own answers how much has been drawn for others. Several
    nodes must have the same one, and each is started with its own arguments.
    """
    return {} if arguments.get("nnodes", 1) != 1 else {"seed": secrets.randbelow(1 << 31)}


def _quantization(arguments: Mapping[str, object], kernel: object) -> dict[str, str]:
    """What makes vLLM look at `quantization_config`. Raises SettingError where that can't run."""
    if arguments.keys().isdisjoint(("quantization", "quantization_config")):
        return {}
    if "quantization_config" not in arguments:
        raise SettingError(f"engine argument quantization: also quantization_config={FP8_EXPERTS}")
    if why := _why_no_fp8(kernel):
        raise SettingError(f"engine argument quantization_config: {why}")
    return {"quantization": "online"}


def _check_quantised(model: Checkpoint, kernel: object, ranks: int) -> None:
    """Whether experts that are FP8 on disk can run here. Raises SettingError."""
    if why := _why_no_fp8(kernel):
        raise SettingError(f"{model.folder}: its experts are FP8: {why}")
    if model.inner % (ranks * BLOCK):
        # vLLM would cut blocks, and run another kernel than that of which masks are shown to hold.
        raise SettingError(
            f"engine argument tensor_parallel_size={ranks}: the experts of {model.folder} are FP8 "
            f"in {model.inner // BLOCK} blocks, which must be divisible by it"
        )


def _why_no_fp8(kernel: object) -> str | None:
    """Why experts can't be multiplied in FP8."""
    if current_platform.is_cpu():
        return "only on GPUs; on CPUs vLLM adds few rows otherwise than many: neighbours would show"
    if not current_platform.supports_fp8():
        return "FP8 takes a GPU of compute capability 8.9 (Ada, Hopper) or later"
    if kernel == "expertgate":
        return "moe_kernel=expertgate multiplies no quantised weights; leave that out"
    return None


def _check_tokenizer(config: ModelConfig) -> None:
    """Makes the one that vLLM will take, and keeps; else this shows once weights are loaded."""
    try:
        cached_tokenizer_from_config(config)
    except Exception as error:  # of a library's many kinds; some list on further lines what may be
        why = _first_line(error).rstrip(": ").removesuffix(" from one of")
        raise SettingError(
            f"{config.tokenizer}: no tokenizer can be made of its files, such as tokenizer.json: "
            f"{why}"
        ) from None


def _check_batch(config: VllmConfig) -> None:
    """The worker fills up every step to so many tokens, which the engine's buffers must hold."""
    most = config.scheduler_config.max_num_batched_tokens
    if most < least_rows():
        raise SettingError(
            f"engine argument max_num_batched_tokens={most}: on this processor at least "
            f"{least_rows()}"
        )


def _worker() -> str:
    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda():
        return GPU_WORKER
    if current_platform.is_unspecified():
        # CUDA's build, for that of CPUs has its platform wherever it runs.
        raise SettingError(
            "no NVIDIA GPU is seen, and this vLLM is built for one: `nvidia-smi` must list it (its "
            "driver; in a container, also its access), or install the CPU's build: "
            "`make VARIANT=cpu`"
        )
    name = current_platform.device_name
    raise SettingError(f"this machine's platform is {name!r}; only cpu and cuda can be served")


class _Parser(FlexibleArgumentParser):
    """Raises where argparse would print its usage, of some three hundred lines, and exit."""

    def error(self, message: str) -> NoReturn:
        flag, _, _ = message.rpartition("unrecognized arguments: ")[2].partition(" ")
        if flag.startswith("--"):
            refuse_arguments({flag[2:].partition("=")[0].replace("-", "_"): None})
        raise SettingError(f"engine arguments: {message}")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
