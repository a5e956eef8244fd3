"""Rows a5 to a8, b2, b3, b6, b7, b10, c1 and c5 of the threats: settings that end the start.

What vLLM makes of its arguments is looked at as well; tests/server/test_refusals.py has that.
"""

import pytest

from tests.server.running import expertgate, prepare

SETTINGS = [
    ("a5", "model_impl: transformers"),
    ("a5", "hf_overrides: {architectures: [OlmoeForCausalLM]}"),
    ("a5", "worker_cls: another.Worker"),
    ("a5", "worker_extension_cls: another.Extension"),
    ("a5", "scheduler_cls: another.Scheduler"),
    ("a5", "trust_remote_code: true"),
    ("a6", "quantization: fp8"),
    ("a6", "quantization_config: {moe: fp8_per_tensor}"),
    ("a7", "enable_eplb: true"),
    ("a7", "enable_elastic_ep: true"),
    ("a8", "enable_lora: true"),
    ("a8", "speculative_config: {method: draft_model, model: another}"),
    ("a8", "speculative_config: {method: eagle, model: another}"),
    ("b2", "kv_transfer_config: {kv_connector: ExampleConnector, kv_role: kv_both}"),
    ("b2", "kv_offloading_size: 1"),
    ("b3", "kv_events_config: {enable_kv_cache_events: true}"),
    ("b6", "enable_return_routed_experts: true"),
    ("b7", "speculative_config: {method: suffix}"),
    ("b10", "logits_processors: [another.Processor]"),
    ("b10", "io_processor_plugin: another"),
    ("c1", "data_parallel_size: 2"),
    ("c1", "enable_expert_parallel: true"),
    ("c5", "enable_sleep_mode: true"),
    ("c5", "enable_dbo: true"),
    ("c5", "prefill_context_parallel_size: 2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    prepare(folder)
    (folder / "keys.yaml").write_text("[]\n")
    return folder


@pytest.mark.parametrize(("row", "setting"), SETTINGS)
def test_it_ends_the_start_with_a_line_that_names_it(folder, row, setting):
    config = folder / "refused.yaml"
    text = (folder / "expertgate.yaml").read_text()
    config.write_text(f"{text}  {setting}\n")
    done = expertgate(folder, "serve", "--config", str(config))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert setting.partition(":")[0] in done.stderr


def test_a_flag_does_so_too(folder):
    done = expertgate(folder, "serve", "--", "--enable-lora")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "enable_lora" in done.stderr
