"""How long a stream outlives a permission: from the change of a file to the error at its client.

`python -m benchmarks.withdrawal` starts `expertgate serve` on the demo model. In each round streams
run that use one expert; then a file is replaced, and the clock runs, from before it is written,
until each client has read `expert_withdrawn`. In turn a policy forbids the expert, the catalogue
takes the tag from it that a policy asks for, the key is revoked, and the expert is suspended.
"""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.audit import server
from benchmarks.checkpoints import DEMO
from benchmarks.command_line import command_line
from benchmarks.machine import about

STREAMS = 8
GOAL_MS = 200
EXPERT = "formulary"
_FORBIDS = f'@id("taken") forbid(principal, action, resource == Expert::"{EXPERT}");\n'


Change = Callable[[], None]


class Stream(threading.Thread):
    """A request that runs until it is ended; `withdrawn_at` is when its error was read."""

    def __init__(self, client: httpx.Client, tokens: int) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._tokens = tokens
        self.flows = threading.Event()
        self.withdrawn_at: float | None = None
        self.start()

    def run(self) -> None:
        body = {"prompt": "a", "max_tokens": self._tokens, "ignore_eos": True, "stream": True}
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if '"expert_withdrawn"' in line:
                    self.withdrawn_at = time.perf_counter()
                elif line:
                    self.flows.set()


def replaced(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def until_granted(client: httpx.Client) -> None:
    def granted() -> bool:
        return EXPERT in [one["name"] for one in client.get("/v1/experts").json().get("data", [])]

    deadline = time.monotonic() + 60
    while not granted():
        if time.monotonic() > deadline:
            raise SystemExit(f"{EXPERT} is not granted again")
        time.sleep(0.05)


def one_round(client: httpx.Client, change: Change) -> list[float]:
    """Milliseconds of each stream."""
    streams = [Stream(client, 900) for _ in range(STREAMS)]
    for stream in streams:
        if not stream.flows.wait(60):
            raise SystemExit("a stream did not begin")
    began = time.perf_counter()
    change()
    for stream in streams:
        stream.join(60)
    ended = [stream.withdrawn_at for stream in streams]
    if None in ended:
        raise SystemExit("a stream was not withdrawn, but came to its own end")
    return [(at - began) * 1e3 for at in ended if at is not None]


def changes_of(site: Path) -> dict[str, tuple[Change, Change]]:
    """By kind: what takes the expert, and what gives it back. `site`: the server's folder."""
    policies, keys = site / "policies" / "taken.cedar", site / "keys.yaml"
    catalogue, suspended = site / "experts.json", site / "suspended.yaml"
    tagged = catalogue.read_text()
    untagged = json.loads(tagged)
    (taken,) = [one for one in untagged["experts"] if one["name"] == EXPERT]
    taken["tags"] = []
    kept = keys.read_text()
    revoked = yaml.safe_load(kept)
    revoked[0]["revoked"] = "2020-01-01T00:00:00Z"
    return {
        "policy": (lambda: replaced(policies, _FORBIDS), policies.unlink),
        "catalogue": (
            lambda: replaced(catalogue, json.dumps(untagged)),
            lambda: replaced(catalogue, tagged),
        ),
        "key": (
            lambda: replaced(keys, yaml.safe_dump(revoked)),
            lambda: replaced(keys, kept),
        ),
        "suspension": (
            lambda: replaced(suspended, f"- {EXPERT}\n"),
            lambda: replaced(suspended, "[]\n"),
        ),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of each kind of change")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    setting = about() | {
        "command": f"python -m benchmarks.withdrawal --rounds {options.rounds}",
        "workload": f"{STREAMS} streams of the demo model at once, on the machine of the server",
    }
    for key, value in setting.items():
        print(f"{key}: {value}")
    took: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        server(Path(name) / "site", DEMO) as (url, key, _),
        httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_connections=STREAMS),
            timeout=120,
        ) as client,
    ):
        changes = changes_of(Path(name) / "site")
        for _ in range(options.rounds):
            for kind, (take, give_back) in changes.items():
                until_granted(client)
                took.setdefault(kind, []).extend(one_round(client, take))
                give_back()
        until_granted(client)
    figures: dict[str, Any] = {}
    for kind, values in took.items():
        # These are all there are: no percentile may lie beyond the slowest.
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        figures[kind] = {
            "median_ms": cuts[49],
            "p99_ms": cuts[98],
            "max_ms": max(values),
            "within_goal": sum(value <= GOAL_MS for value in values) / len(values),
            "all_ms": [round(value, 2) for value in values],
        }
        shown = {k: v for k, v in figures[kind].items() if k != "all_ms"}
        print(f"{kind}:", ", ".join(f"{k} {v:.3f}" for k, v in shown.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": setting, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
