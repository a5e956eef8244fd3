"""What the benchmark counts and compares; the contenders themselves run in `make bench`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import FlexOlmoForCausalLM

from benchmarks import report
from benchmarks.checkpoints import DEMO, SHAPES, locate, weight_bytes, without_others
from benchmarks.figures import figures, middle, ratio
from benchmarks.machine import PeakMemory
from benchmarks.throughput import CONTENDERS, OURS
from benchmarks.workloads import ABOUT, Size, tenant_sets, workloads
from expertgate.policies.expert_set import ExpertSet
from tests.support.checkpoints import random_checkpoint
from tests.support.oracle import RowDeletion

SIZE = Size(requests=50, prompt=8, output=4, system=16)


def test_workloads_are_the_same_for_the_same_seed_and_no_other():
    first, again, other = (workloads(7, 1000, SIZE, seed) for seed in (0, 0, 1))
    assert first == again
    assert all(a.requests != b.requests for a, b in zip(first, other, strict=True))


def test_workloads_are_what_they_say():
    made = {w.name: w for w in workloads(7, 1000, SIZE, 0)}
    assert set(made) == set(ABOUT)
    assert made["all experts"].sets == [ExpertSet.first(7)]
    assert made["public + one"].sets == [ExpertSet.first(2)]
    assert set(made["tenant mix"].sets) <= set(tenant_sets(7))
    assert made["tenant mix"].sets[0] == tenant_sets(7)[0]  # the one that asks most
    assert len(made["random sets"].sets) > 20
    assert all(0 in experts for experts in made["random sets"].sets)
    shared = {request.prompt[:16] for request in made["shared prefix"].requests}
    assert len(shared) == 1
    assert all(len(request.prompt) == 24 for request in made["shared prefix"].requests)


@pytest.mark.parametrize("num_experts", [2, 3, 7, 64])
def test_tenants_differ(num_experts):
    sets = tenant_sets(num_experts)
    assert len(set(sets)) == len(sets) <= 4
    assert all(0 in experts and experts <= ExpertSet.first(num_experts) for experts in sets)


def test_a_checkpoint_without_others_is_the_row_deleted_model(tmp_path):
    kept = ExpertSet.of([0, 2, 5])
    whole = random_checkpoint(tmp_path / "whole", num_experts=6, top_k=4)
    folder = without_others(whole, kept, tmp_path / "part")
    prompt, tokens = [5, 9, 12, 7], [3, 4, 5]
    expected = RowDeletion(whole).force(kept, prompt, tokens)
    model = FlexOlmoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert logprobs.tolist() == expected.logprobs
    assert model.config.num_experts == 3


def test_all_contenders_load_the_same_without_biases(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.checkpoints.BUILD", tmp_path)
    folder, dummy = locate(str(DEMO))
    whole, plain = (load_file(f / "model.safetensors") for f in (DEMO, folder))
    assert not dummy
    assert {name for name in whole if name not in plain} == {
        name for name in whole if name.endswith("expert_bias")
    }
    assert all(torch.equal(whole[name], tensor) for name, tensor in plain.items())
    again, _ = locate(str(folder))
    assert again == folder


def test_weights_are_counted_right():
    whole = sum(t.nbytes for t in load_file(DEMO / "model.safetensors").values())
    assert weight_bytes(DEMO) == pytest.approx(whole, rel=0.01)  # all but the norms


def test_the_large_random_model_is_about_as_large_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.checkpoints.BUILD", tmp_path)
    folder, dummy = locate("shape-7x7b")
    assert dummy
    assert weight_bytes(folder) == pytest.approx(2 * 33.3e9, rel=0.01)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps(SHAPES["random-0.5b"]))
    assert weight_bytes(tmp_path / "half") == pytest.approx(2 * 0.5e9, rel=0.1)


def test_figures_of_known_times():
    times = [[0.0, 0.1, 0.2, 0.4], [0.0, 0.3, 0.5, 1.0]]
    found = figures(times, peak_bytes=2_000_000_000, weight_bytes=500_000_000)
    assert found.tokens_per_s == 6.0
    assert found.requests_per_s == 2.0
    assert found.ttft_ms == pytest.approx({"p50": 100, "p90": 300, "p99": 300})
    assert found.inter_token_ms == pytest.approx({"p50": 200, "p90": 500, "p99": 500})
    assert found.tokens_per_s_per_gb == 12.0


def test_the_ratio_is_to_the_best_peer_round_by_round():
    found = ratio([10.0, 30.0, 20.0], {"slow": [1.0, 1.0, 1.0], "fast": [5.0, 10.0, 20.0]})
    assert found is not None
    assert (found.peer, found.median, found.lowest, found.highest) == ("fast", 2.0, 1.0, 3.0)
    assert ratio([1.0], {}) is None
    least = ratio([10.0], {"slow": [40.0], "fast": [20.0]}, least=True)
    assert least is not None
    assert (least.peer, least.median) == ("fast", 0.5)


def test_memory_is_that_of_the_whole_tree():
    hold = "import time; kept = bytearray(b'x') * 300_000_000; print(flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        memory = PeakMemory([process.pid])
        assert memory._host() > 300_000_000
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_report_says_all_of_it(tmp_path):
    runs = {
        name: {
            workload: [figures([[0.0, 0.1, 0.2 / speed]], 10**9, 10**9) for speed in (1, 1.5)]
            for workload in ABOUT
        }
        for name in CONTENDERS
    }
    facts = {"cpu": "a cpu", "model": "a model", "command": "python -m benchmarks.throughput"}
    report.write(tmp_path, facts, vars(SIZE), runs, OURS)
    text = (tmp_path / "README.md").read_text()
    table, compared = text.split("\n\nOurs to the best")
    assert table.count("\n| ") == 2 + len(ABOUT) * len(CONTENDERS)
    assert table.count("**1.00") == len(ABOUT)
    figures_of_each = 2 + 3 + 3 + 2  # rates, two times at three percentiles, memory, by weights
    assert compared.count("1.00 (1.00 to 1.00)") == figures_of_each * len(ABOUT)
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["about"] == facts
    assert len(saved["runs"][OURS]["tenant mix"]) == 2
    assert (tmp_path / "figures.png").stat().st_size > 10_000


def test_of_several_runs_the_first_is_left_out_as_cold():
    runs = [
        figures([[0.0, 0.1, 0.1 + seconds]], 10**9 * peak, 10**9)
        for seconds, peak in ((9.9, 1), (0.1, 3), (0.3, 2), (0.2, 1))
    ]
    found = middle(runs)
    assert found.tokens_per_s == pytest.approx(2 / 0.3)
    assert found.inter_token_ms == pytest.approx({"p50": 200, "p90": 200, "p99": 200})
    assert found.peak_memory_gb == 3
    assert middle(runs[:1]) == runs[0]


def test_rounds_are_added_to_what_was_measured_on_the_same_machine(tmp_path):
    facts = dict.fromkeys(("model", "cpu", "engine", "torch", "load"), "as before")
    one = figures([[0.0, 0.1, 0.2]], 10**9, 10**9)
    report.write(tmp_path, facts, vars(SIZE), {OURS: {"tenant mix": [one]}}, OURS)
    known, runs = report.earlier(tmp_path, facts | {"load": "more"}, vars(SIZE), [OURS])
    assert known == facts | {"load": "as before; then more"}
    assert runs == {OURS: {"tenant mix": [one]}}
    with pytest.raises(SystemExit, match="cpu"):
        report.earlier(tmp_path, facts | {"cpu": "another"}, vars(SIZE), [OURS])
    with pytest.raises(SystemExit, match="contenders"):
        report.earlier(tmp_path, facts, vars(SIZE), list(CONTENDERS))
