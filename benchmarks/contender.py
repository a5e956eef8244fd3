"""One engine in a process of its own: `python -m benchmarks.contender KIND ...`.

Says `ready` once it is warm. For each line on stdin, the name of a workload, it runs the requests
of that workload and answers with one line of JSON: for each the times at which its tokens came.
Times are of the machine's clock, so that several processes can be told apart from one another.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import num_experts
from benchmarks.workloads import Request, Size, Workload, workloads

Times = list[list[float]]
"""For each request the time of its start, then of each of its tokens."""


class Vllm:
    """vLLM, either ours (masked by request) or stock (all experts of its checkpoint)."""

    def __init__(self, options: argparse.Namespace, *, masked: bool) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from expertgate.model import cpu_process

        self._masked = masked
        arguments: dict[str, Any] = {
            "model": options.checkpoint,
            "max_model_len": options.system + options.prompt + options.output + 8,
            "max_num_seqs": options.requests,
            "enforce_eager": options.eager,
            "enable_prefix_caching": True,
            "kv_cache_memory_bytes": options.kv_mib << 20,
            "load_format": "dummy" if options.dummy else "auto",
            "use_tqdm_on_load": False,
        }
        if masked and current_platform.is_cpu():
            # As `expertgate serve` starts it.
            arguments["worker_cls"] = "expertgate.model.cpu_worker.MaskedCPUWorker"
            arguments["distributed_executor_backend"] = cpu_process.EXECUTOR
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
        with cpu_process.openmp(config):
            self._engine = AsyncLLM.from_vllm_config(config)

    async def run(self, asked: Sequence[Request]) -> Times:
        await self._engine.reset_prefix_cache()
        return await asyncio.gather(
            *(self._one(place, request) for place, request in enumerate(asked))
        )

    async def _one(self, place: int, request: Request) -> list[float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from expertgate.model.masks import EXTRA_ARG

        params = SamplingParams(
            temperature=0,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={EXTRA_ARG: request.experts.mask} if self._masked else None,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt)}
        if self._masked:
            prompt["cache_salt"] = request.experts.text
        times = [time.time()]
        async for output in self._engine.generate(prompt, params, f"{place}-{times[0]}"):
            now = time.time()
            times += [now] * len(output.outputs[0].token_ids)
        return times

    def close(self) -> None:
        self._engine.shutdown()
        del self._engine  # while the modules that its end needs are still there


class HuggingFace:
    """`generate`, a batch for each set in turn, on a model whose other rows are deleted.

    There is one model in memory, cut anew for each set, so sets wait for one another.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import FlexOlmoForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = FlexOlmoForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16)
        self._model = model.eval().to(self._device)
        self._top_k = model.config.num_experts_per_tok
        self._whole = [
            (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
            for layer in model.model.layers
        ]

    async def run(self, asked: Sequence[Request]) -> Times:
        began = time.time()
        times: Times = [[began] for _ in asked]
        for experts in dict.fromkeys(request.experts for request in asked):
            places = [i for i, request in enumerate(asked) if request.experts == experts]
            self._keep(list(experts))
            self._generate([asked[i] for i in places], [times[i] for i in places])
        return times

    def _keep(self, kept: list[int]) -> None:
        from torch.nn import Parameter

        for layer, (rows, gate_up, down) in zip(self._model.model.layers, self._whole, strict=True):
            router, ffn = layer.mlp.gate, layer.mlp.experts
            router.weight = Parameter(rows[kept], requires_grad=False)
            ffn.gate_up_proj = Parameter(gate_up[kept], requires_grad=False)
            ffn.down_proj = Parameter(down[kept], requires_grad=False)
            router.num_experts = ffn.num_experts = len(kept)
            router.top_k = min(self._top_k, len(kept))

    def _generate(self, asked: list[Request], times: Times) -> None:
        import torch

        def note(*_: Any, **__: Any) -> Any:
            now = time.time()
            for each in times:
                each.append(now)
            return torch.zeros(len(asked), dtype=torch.bool, device=self._device)

        prompts = torch.tensor([request.prompt for request in asked], device=self._device)
        [tokens] = {request.output_tokens for request in asked}
        with torch.inference_mode():
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                stopping_criteria=[note],
            )


def engine(options: argparse.Namespace) -> Vllm | HuggingFace:
    if options.kind == "transformers":
        return HuggingFace(options)
    return Vllm(options, masked=options.kind == "expertgate")


def asked_of(options: argparse.Namespace, workload: Workload) -> list[Request]:
    """The part of a workload that is this process's, where there is one for each set."""
    only = options.only
    return [r for r in workload.requests if only is None or r.experts.text == only]


async def serve(options: argparse.Namespace) -> None:
    contender = engine(options)
    size = Size(options.requests, options.prompt, options.output, options.system)
    source = Path(options.source)
    vocabulary = int(json.loads((source / "config.json").read_text())["vocab_size"])
    known = {w.name: w for w in workloads(num_experts(source), vocabulary, size, options.seed)}
    await contender.run(asked_of(options, known["tenant mix"])[:4])
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            times = await contender.run(asked_of(options, known[line.strip()]))
            print(json.dumps(times), flush=True)
    finally:
        if isinstance(contender, Vllm):
            contender.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("expertgate", "stock", "transformers"))
    parser.add_argument("--checkpoint", required=True, help="what this engine loads")
    parser.add_argument("--source", required=True, help="the checkpoint that workloads are for")
    parser.add_argument("--only", help="the requests of this set alone")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dummy", action="store_true")
    for name in ("requests", "prompt", "output", "system", "seed", "kv-mib"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
