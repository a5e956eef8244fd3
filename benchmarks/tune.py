"""Finds the fastest tiles of the two grouped products on this GPU, and keeps them as data.

`python -m benchmarks.tune` tries, for several numbers of tokens, a list of tiles for each product;
what does not compile, does not fit or gives another result is dropped. The score is the geometric
mean of the times with all experts allowed and with public and one more, in a CUDA graph. It writes
`expertgate/kernels/gpu/tuned/<GPU>.json`, which the kernels read when they are next imported.
"""

import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.command_line import command_line
from benchmarks.kernels import SCALES, TOP_K, E, about, captured, make, seconds, weights
from expertgate.kernels.gpu.combine import combine
from expertgate.kernels.gpu.grouping import Groups, group
from expertgate.kernels.gpu.products import down, gate_up
from expertgate.kernels.gpu.shapes import TUNED, Device, Shape, Tiles, choose

MASKS = ("all allowed", "public + one")


def streaming(rows: int, hopper: bool) -> Iterator[Tiles]:
    """For few tokens: one row tile an expert, and weights in flight."""
    for columns, depth in ((32, 128), (64, 64), (64, 128), (128, 64)):
        for stages in (3, 4, 5):
            tiles = Tiles(rows, columns, depth, num_warps=4, num_stages=stages)
            yield replace(tiles, swap=hopper and columns >= 64 and rows < 64)
    if hopper and rows <= 64:
        # What the others are not: rows times weights below 64 rows, the reverse at 64.
        yield replace(tiles, swap=rows == 64)


def computing(hopper: bool) -> Iterator[Tiles]:
    """For many tokens: large tiles, some of them on programs that stay."""
    for rows, columns in ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128)):
        for stages in (3, 4):
            tiles = Tiles(rows, columns, 64, num_warps=8, num_stages=stages, group_m=8)
            yield tiles
            if hopper:
                yield replace(tiles, descriptors=True)
                yield replace(tiles, descriptors=True, programs_per_sm=1)


def candidates(T: int, hopper: bool) -> list[Tiles]:
    if T <= 128:
        return list(streaming(max(16, 1 << (T - 1).bit_length()), hopper))
    few = [replace(t, group_m=4) for t in streaming(64, hopper)] if T <= 512 else []
    return few + list(computing(hopper))


def best(
    tried: list[Tiles],
    first: Tiles,
    product: Callable[[Tiles, int], torch.Tensor],
    measuring: bool,
) -> tuple[Tiles, float]:
    """The fastest of `tried` whose result is that of `first`, and its score in seconds.

    Without `measuring` all are run once, which compiles them, and none is better than another.
    """
    want = [product(first, i).float() for i in range(len(MASKS))]
    scores: dict[Tiles, float] = {}
    for tiles in dict.fromkeys([first, *tried]):
        times = []
        try:
            for i in range(len(MASKS)):
                got = product(tiles, i).float()
                if (got - want[i]).abs().max() > 0.02 * want[i].abs().max():
                    raise ValueError("another result")
                run = captured(lambda tiles=tiles, i=i: product(tiles, i))  # type: ignore[misc]
                times.append(seconds(run, "cuda", 0.02) if measuring else 1.0)
        except Exception as error:  # the compiler alone has several kinds for what doesn't fit
            why = str(error).strip().splitlines()
            print(f"    without {tiles}: {why[0] if why else type(error).__name__}", flush=True)
            continue
        scores[tiles] = statistics.geometric_mean(times)
    winner = min(scores, key=lambda tiles: scores[tiles])
    return winner, scores[winner]


def tune(
    T: int, w: tuple[torch.Tensor, torch.Tensor], device: Device, measuring: bool
) -> dict[str, Any]:
    layers = [make(w, T, kind) for kind in MASKS]
    groups: list[Groups] = [group(layer.plan.experts, E) for layer in layers]
    hopper = device.capability >= (9, 0)
    by_rule = choose(device, T=T, E=E, H=w[1].shape[1], I=w[1].shape[2], dtype=w[1].dtype)
    tried = candidates(T, hopper)
    # Rows that no group has are never written; here they are compared, so they must be something.
    counts = [int(g.starts[-1]) for g in groups]

    def first_product(tiles: Tiles, i: int) -> torch.Tensor:
        return gate_up(layers[i].x, w[0], groups[i], TOP_K, tiles)[: counts[i]]

    inner = [
        gate_up(layer.x, w[0], grouped, TOP_K, by_rule.gate_up)
        for layer, grouped in zip(layers, groups, strict=True)
    ]

    def second_product(tiles: Tiles, i: int) -> torch.Tensor:
        # With the sum of the parts, which is what splitting costs.
        out = torch.empty_like(layers[i].x)
        combine(down(inner[i], w[1], groups[i], tiles), layers[i].plan, out)
        return out

    upper, upper_s = best(tried, by_rule.gate_up, first_product, measuring)
    # First the tiles, split as the rule says, then in how many parts.
    parts = by_rule.down.split_k
    lower, _ = best(
        [replace(t, split_k=parts) for t in tried], by_rule.down, second_product, measuring
    )
    lower, lower_s = best(
        [replace(lower, split_k=s) for s in (1, 2, 4)], lower, second_product, measuring
    )
    print(f"T={T}: gate_up {upper_s * 1e6:.1f} us {upper}; down {lower_s * 1e6:.1f} us {lower}")
    return {
        "tokens": T,
        "shape": asdict(Shape(upper, lower)),
        "gate_up_us": upper_s * 1e6,
        "down_and_combine_us": lower_s * 1e6,
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", help="only these numbers of tokens")
    parser.add_argument(
        "--compile", action="store_true", help="only compile, so that several may run side by side"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune: no GPU here, and what isn't measured isn't written")
    scale = SCALES["cuda"]
    device = Device.of(torch.device("cuda", torch.cuda.current_device()))
    with torch.inference_mode():
        w = weights(scale, "cuda")
        found = [
            tune(T, w, device, measuring=not options.compile)
            for T in options.tokens or scale.tokens
        ]
    if options.compile:
        return
    path = TUNED / f"{device.name.replace(' ', '_')}.json"
    layer = {
        "experts": E,
        "hidden": scale.hidden,
        "inner": scale.inner,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "shapes": found,
    }
    how = about(scale, "cuda", 1) | {
        "command": "python -m benchmarks.tune",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "masks": list(MASKS),
    }
    path.write_text(json.dumps({"how": how, "layers": [layer]}, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
