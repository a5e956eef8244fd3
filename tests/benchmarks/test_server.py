"""What the benchmark of the server compares; the servers themselves run in it."""

from benchmarks.figures import Figures
from benchmarks.load import Answer
from benchmarks.report import Page, markdown
from benchmarks.server import OURS, STOCK, Bench, notes, rate_between


def figures(tokens_per_s: float, ttft_ms: float) -> Figures:
    times = {"p50": ttft_ms, "p90": 2 * ttft_ms, "p99": 3 * ttft_ms}
    return Figures(tokens_per_s, 10, times, times, 1, 1)


def bench(rounds, cost) -> Bench:
    found = object.__new__(Bench)
    found.runs = {"8 streams": [figures(*each) for each in rounds]}
    found.costs = {"8 streams": [{"server": cost, "engine": 2 * cost}] * len(rounds)}
    found.overloads = [
        {
            "goodput_to_peak": 0.9 + number / 100,
            "answered": 10,
            "refused": 5,
            "refused_with_retry_after": 4,
            "broken": 0,
            "hung": number,
            "ttft_p50_ms": 7.0,
        }
        for number in range(len(rounds))
    ]
    return found


def test_rounds_are_compared_with_themselves():
    ours = bench([(90, 12), (200, 10), (50, 30)], 0.25)
    stock = bench([(100, 10), (200, 9), (40, 20)], 0.2)
    lines = notes(ours, stock)
    assert (
        "| 8 streams | 1.00 (0.90 to 1.25) | 2.0 (1.0 to 10.0) | 0.250 + 0.500 | 0.200 + 0.400 |"
    ) in lines
    assert f"| {OURS} | 0.91 (0.90 to 0.92) | 30 | 15 (12) | 0 | 3 | 7 (7 to 7) |" in lines
    ours.keep(1)
    assert [len(found) for found in (*ours.runs.values(), *ours.costs.values())] == [1, 1]
    assert len(ours.overloads) == 1


def test_a_page_has_its_own_workloads_and_notes():
    runs = {name: bench([(100, 10)], 1).runs for name in (OURS, STOCK)}
    page = Page("A page", {"8 streams": "so many"}, ["", "the end"])
    text = markdown({"cpu": "one"}, {"prompt": 4}, runs, OURS, page)
    assert text.startswith("# A page\n")
    assert "- 8 streams: so many" in text
    assert "| 8 streams | stock vLLM | 100 |" in text
    assert text.endswith("\nthe end\n")


def test_goodput_is_of_the_tokens_within_the_time():
    answers = [
        Answer(200, [0.0, 1.0, 2.0, 3.0], whole=True),
        Answer(200, [1.5, 2.5, 9.0], whole=True),
    ]
    assert rate_between(answers, 2.0, 4.0) == 1.5
