"""The figures of a run as a table, as JSON and as a plot."""

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import PERCENTILES, Figures, Ratio, ratio
from benchmarks.workloads import ABOUT

Runs = Mapping[str, Mapping[str, Sequence[Figures]]]
"""Contender → workload → a figure for each round."""

_BELOW = (
    "Medians over the rounds. The last column: our tokens/s as a ratio to that contender's of the"
    " same round, median (lowest to highest); the best peer in bold."
)
_HEAD = (
    "| workload | contender | tokens/s | requests/s | TTFT ms p50/p90/p99 |"
    " between tokens ms p50/p90/p99 | peak memory GB | tokens/s per GB of weights |"
    " ours to it |"
)


def _percentile(figure: str, p: int) -> Callable[[Figures], float]:
    return lambda f: float(getattr(f, figure)[f"p{p}"])


_COMPARED: dict[str, tuple[Callable[[Figures], float], bool]] = {
    "tokens/s": (lambda f: f.tokens_per_s, False),
    "requests/s": (lambda f: f.requests_per_s, False),
    **{f"TTFT p{p}": (_percentile("ttft_ms", p), True) for p in PERCENTILES},
    **{f"between tokens p{p}": (_percentile("inter_token_ms", p), True) for p in PERCENTILES},
    "peak memory": (lambda f: f.peak_memory_gb, True),
    "tokens/s per GB of weights": (lambda f: f.tokens_per_s_per_gb, False),
}
"""Figure → how to read it, and whether less is better."""


@dataclass(frozen=True)
class Page:
    """What differs from one benchmark to another: its title, its workloads, what it adds."""

    title: str
    about: Mapping[str, str]
    """Workload → words."""
    notes: Sequence[str] = ()
    """Lines of Markdown below the tables."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What figures.json has besides."""


THROUGHPUT = Page("Throughput", ABOUT)


def write(
    out: Path | None,
    facts: Mapping[str, str],
    size: Mapping[str, int],
    runs: Runs,
    ours: str,
    page: Page = THROUGHPUT,
) -> None:
    """Prints the table; with a folder, also writes README.md, figures.json and figures.png."""
    text = markdown(facts, size, runs, ours, page)
    print(f"\n{text}")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text)
    whole = {
        "about": facts,
        "size": size,
        "runs": {
            name: {workload: [f.as_json() for f in found] for workload, found in each.items()}
            for name, each in runs.items()
        },
        **page.more,
    }
    (out / "figures.json").write_text(json.dumps(whole, indent=2) + "\n")
    plot(out / "figures.png", facts, runs, page)


def earlier(
    out: Path, facts: Mapping[str, str], size: Mapping[str, int], names: Sequence[str]
) -> tuple[dict[str, str], dict[str, dict[str, list[Figures]]]]:
    """What `out` has, to add rounds to. A fact that differs, such as the load, says both.

    Raises SystemExit where the new rounds could not be compared with the old.
    """
    whole = json.loads((out / "figures.json").read_text())
    for what, new, old in (
        ("lengths", dict(size), whole["size"]),
        ("contenders", list(names), list(whole["runs"])),
        *((key, facts[key], whole["about"][key]) for key in ("model", "cpu", "engine", "torch")),
    ):
        if new != old:
            raise SystemExit(f"{out}: its {what} are {old}, not {new}; give another --out")
    known = {
        key: old if old == facts[key] else f"{old}; then {facts[key]}"
        for key, old in whole["about"].items()
    }
    runs = {
        name: {workload: [Figures.of(f) for f in found] for workload, found in each.items()}
        for name, each in whole["runs"].items()
    }
    return known, runs


def markdown(
    facts: Mapping[str, str],
    size: Mapping[str, int],
    runs: Runs,
    ours: str,
    page: Page = THROUGHPUT,
) -> str:
    lines = [f"# {page.title}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- lengths: {', '.join(f'{key} {value}' for key, value in size.items())}", ""]
    lines += [f"- {name}: {words}" for name, words in page.about.items()]
    lines += ["", _BELOW, "", _HEAD, "|" + " --- |" * (_HEAD.count("|") - 1)]
    for workload in page.about:
        peers = {
            name: [f.tokens_per_s for f in each[workload]]
            for name, each in runs.items()
            if name != ours and workload in each
        }
        mine = [f.tokens_per_s for f in runs.get(ours, {}).get(workload, ())]
        best = ratio(mine, peers) if mine else None
        for name, each in runs.items():
            if workload not in each:
                continue
            theirs = ratio(mine, {name: peers[name]}) if mine and name != ours else None
            lines.append(_row(workload, name, each[workload], theirs, best))
    return "\n".join([*lines, *_compared(runs, ours, page), *page.notes]) + "\n"


def _compared(runs: Runs, ours: str, page: Page) -> list[str]:
    """A table of every figure of ours as a ratio to that of the best peer."""
    lines = [
        "",
        "Ours to the best peer's of the same round, median (lowest to highest). Of times and",
    ]
    lines += ["memory less is better, so below 1 is ours.", "", f"| | {' | '.join(page.about)} |"]
    lines.append("|" + " --- |" * (len(page.about) + 1))
    for figure, (value, least) in _COMPARED.items():
        cells = [figure]
        for workload in page.about:
            rounds = {
                name: [value(f) for f in each[workload]]
                for name, each in runs.items()
                if workload in each
            }
            mine = rounds.pop(ours, [])
            found = ratio(mine, rounds, least=least) if mine else None
            cells.append(f"{found}, {found.peer}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _row(
    workload: str, name: str, found: Sequence[Figures], theirs: Ratio | None, best: Ratio | None
) -> str:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def three(key: str) -> str:
        parts = [getattr(f, key) for f in found]
        return " / ".join(f"{median([p[name] for p in parts]):.0f}" for name in parts[0])

    compared = "" if theirs is None else str(theirs)
    if best is not None and best.peer == name:
        compared = f"**{compared}**"
    cells = [
        workload,
        name,
        _number(median([f.tokens_per_s for f in found])),
        _number(median([f.requests_per_s for f in found])),
        three("ttft_ms"),
        three("inter_token_ms"),
        f"{median([f.peak_memory_gb for f in found]):.2f}",
        _number(median([f.tokens_per_s_per_gb for f in found])),
        compared,
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """To three digits, or whole."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


_WITH = ("engine", "torch", "transformers", "python", "commit", "command")
"""Facts that stand at the foot of the plot."""


def plot(path: Path, facts: Mapping[str, str], runs: Runs, page: Page = THROUGHPUT) -> None:
    """Tokens/s by workload, and what memory each contender took, with the spread over rounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(12, 5), width_ratios=(4, 1), layout="constrained"
    )
    width = 0.8 / len(runs)
    for place, (name, each) in enumerate(runs.items()):
        at = [row + place * width for row, workload in enumerate(page.about) if workload in each]
        rates = [[f.tokens_per_s for f in each[w]] for w in page.about if w in each]
        middle = [statistics.median(each_round) for each_round in rates]
        spread = [
            [m - min(each_round) for m, each_round in zip(middle, rates, strict=True)],
            [max(each_round) - m for m, each_round in zip(middle, rates, strict=True)],
        ]
        speed.bar(at, middle, width=width, yerr=spread, label=name, capsize=2)
        peaks = [max(f.peak_memory_gb for found in each.values() for f in found)]
        memory.bar([place], peaks, width=0.8)
    places = [row + 0.4 - width / 2 for row in range(len(page.about))]
    speed.set_xticks(places, list(page.about))
    speed.set_ylabel("output tokens/s")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08)}
    speed.legend(**below, ncols=len(runs), frameon=False)
    speed.set_title("more is better; lines: lowest and highest round", fontsize="medium")
    memory.set_xticks(range(len(runs)), list(runs), rotation=30, ha="right")
    memory.set_ylabel("peak memory, GB")
    memory.set_title("less is better", fontsize="medium")
    figure.suptitle(f"{facts['model']}; {facts.get('gpu', facts['cpu'])}", fontsize="medium")
    said = "; ".join(f"{key} {facts[key]}" for key in _WITH if key in facts)
    figure.supxlabel("\n".join(textwrap.wrap(said, 190)), fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
