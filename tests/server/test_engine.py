import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms.interface import UnspecifiedPlatform
from vllm.usage.usage_lib import UsageContext

from expertgate.model import cpu_process
from expertgate.model.checkpoint import Checkpoint
from expertgate.model.moe_kernel import OPTION
from expertgate.server import engine
from expertgate.server.demo import DEMO
from expertgate.server.grants import Grants
from expertgate.server.refusals import SettingError, refuse_arguments
from tests.support import fp8
from tests.support.checkpoints import random_checkpoint


@pytest.fixture
def given(monkeypatch):
    """What vLLM is given; the start ends there."""
    seen = {}

    class Arguments:
        def __init__(self, **arguments):
            seen.update(arguments)
            raise ValueError("as far as this goes")

    monkeypatch.setattr(engine, "AsyncEngineArgs", Arguments)

    def start(**arguments):
        with pytest.raises(SettingError, match="as far as this goes"):
            engine.start(Path("/checkpoint"), "name", arguments, Grants())
        return seen

    return start


def test_batches_are_as_large_as_in_vllms_own_server(monkeypatch):
    seen = []

    class Arguments:
        def __init__(self, **_):
            pass

        def create_engine_config(self, usage_context=None):
            seen.append(usage_context)
            raise ValueError("as far as this goes")

    monkeypatch.setattr(engine, "AsyncEngineArgs", Arguments)
    with pytest.raises(SettingError, match="as far as this goes"):
        engine.start(Path("/checkpoint"), "name", {}, Grants())
    assert seen == [UsageContext.OPENAI_API_SERVER]


def test_the_first_request_does_not_choose_how_schemas_are_compiled(given):
    assert given()["structured_outputs_config"] == {"backend": "xgrammar"}


def test_nobody_knows_what_is_drawn_without_a_seed(given):
    """From answers one could else tell how much was drawn for others: vLLM's own seed is 0."""
    assert given()["seed"] != given()["seed"]
    assert given(seed=5)["seed"] == 5


def test_several_nodes_have_the_seed_that_they_are_given(given):
    """Each starts with its own arguments, and must draw as the others do."""
    assert "seed" not in given(nnodes=2)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, cpu_process.EXECUTOR),
        ({"distributed_executor_backend": "uni"}, cpu_process.EXECUTOR),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 1}, cpu_process.EXECUTOR),
        ({"distributed_executor_backend": "mp"}, "mp"),
        ({"tensor_parallel_size": 2}, None),
        ({"pipeline_parallel_size": 2}, None),
    ],
)
def test_on_a_cpu_a_worker_that_is_alone_shares_the_engines_process(
    given, monkeypatch, arguments, wanted
):
    monkeypatch.setattr(engine, "_worker", lambda: engine.CPU_WORKER)
    assert given(**arguments).get("distributed_executor_backend") == wanted


def test_on_a_gpu_vllm_chooses_the_processes(given, monkeypatch):
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    assert "distributed_executor_backend" not in given()


def test_vllms_moe_kernels_are_the_default(given):
    assert given()["additional_config"] == {OPTION: "vllm"}


def test_the_moe_kernel_goes_to_the_model_and_not_to_vllm(given, monkeypatch):
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    seen = given(moe_kernel="expertgate")
    assert seen["additional_config"] == {OPTION: "expertgate"}
    assert "moe_kernel" not in seen


def test_our_moe_kernels_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(engine, "_worker", lambda: engine.CPU_WORKER)
    with pytest.raises(SettingError, match="moe_kernel=expertgate: those kernels are for NVIDIA"):
        engine.start(Path("/checkpoint"), "name", {"moe_kernel": "expertgate"}, Grants())


FP8 = {"moe": "fp8_per_block"}


class Platform:
    def __init__(self, cpu=False, fp8=True):
        self.is_cpu, self.supports_fp8 = (lambda: cpu), (lambda: fp8)


def test_vllm_is_told_to_look_at_how_experts_are_quantised(given, monkeypatch):
    """By `quantization` alone it decides whether it does, and says nothing if not."""
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    monkeypatch.setattr(engine, "current_platform", Platform())
    assert "quantization" not in given()
    assert given(quantization_config=FP8)["quantization"] == "online"


def test_how_experts_are_quantised_is_a_flag_too():
    flags = engine.parse_flags(["--quantization-config", '{"moe": "fp8_per_block"}'])
    assert flags == {"quantization_config": FP8}
    refuse_arguments(flags)


@pytest.mark.parametrize(
    ("platform", "arguments", "words"),
    [
        (Platform(cpu=True), {}, "neighbours would show"),
        (Platform(fp8=False), {}, "compute capability 8.9"),
        (Platform(), {"moe_kernel": "expertgate"}, "no quantised weights"),
    ],
)
def test_where_quantised_experts_can_not_run_it_is_said(monkeypatch, platform, arguments, words):
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    monkeypatch.setattr(engine, "current_platform", platform)
    arguments = {"quantization_config": FP8, **arguments}
    with pytest.raises(SettingError, match=f"quantization_config: .*{words}"):
        engine.configure(Path("/checkpoint"), "name", arguments)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A checkpoint whose experts are FP8, in three blocks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return fp8.quantised(
        random_checkpoint(folder / "plain", num_experts=2, inner=384, layers=1), folder / "fp8"
    )


@pytest.mark.parametrize(
    ("platform", "kernel", "ranks", "words"),
    [
        (Platform(cpu=True), "vllm", 1, "its experts are FP8: only on GPUs.*neighbours would show"),
        (Platform(fp8=False), "vllm", 1, "its experts are FP8: .*compute capability 8.9"),
        (Platform(), "expertgate", 1, "its experts are FP8: moe_kernel=expertgate multiplies no"),
        (Platform(), "vllm", 2, "tensor_parallel_size=2: .* in 3 blocks, which must be divisible"),
    ],
)
def test_where_experts_that_are_fp8_on_disk_can_not_run_it_is_said(
    quantised, monkeypatch, platform, kernel, ranks, words
):
    monkeypatch.setattr(engine, "current_platform", platform)
    with pytest.raises(SettingError, match=words):
        engine._check_quantised(Checkpoint(quantised), kernel, ranks)


def test_where_they_can_nothing_is_said(quantised, monkeypatch):
    monkeypatch.setattr(engine, "current_platform", Platform())
    for ranks in (1, 3):
        engine._check_quantised(Checkpoint(quantised), "vllm", ranks)


def test_they_are_seen_before_an_engine_starts(quantised):
    with pytest.raises(SettingError, match="its experts are FP8: only on GPUs"):
        engine.configure(quantised, "name", {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"moe_kernel": "expertgate"}, "moe_kernel=expertgate multiplies no"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: .* in 3 blocks"),
    ],
)
def test_they_are_seen_with_what_they_would_run_on(quantised, monkeypatch, arguments, words):
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    monkeypatch.setattr(engine, "current_platform", Platform())
    with pytest.raises(SettingError, match=words):
        engine.configure(quantised, "name", arguments)


def test_they_are_not_quantised_once_more(quantised, monkeypatch):
    monkeypatch.setattr(engine, "_why_no_fp8", lambda _: None)
    with pytest.raises(SettingError, match="does not match the quantization method"):
        engine.configure(quantised, "name", {"quantization_config": FP8})


def test_quantisation_without_what_to_quantise_is_refused():
    with pytest.raises(SettingError, match="quantization: also quantization_config="):
        engine.configure(Path("/checkpoint"), "name", {"quantization": "online"})


@pytest.mark.parametrize("flag", [["--moe-kernel", "vllm"], ["--moe-kernel=vllm"]])
def test_the_moe_kernel_is_a_flag_behind_vllms_own(flag):
    assert engine.parse_flags(flag) == {"moe_kernel": "vllm"}


def test_another_moe_kernel_is_refused():
    with pytest.raises(SettingError, match="moe_kernel=cutlass: only expertgate or vllm"):
        refuse_arguments({"moe_kernel": "cutlass"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_num_seqs": 0}, "engine argument max_num_seqs=0: Input should be greater than"),
        ({"block_size": "x"}, "engine argument block_size=x: Input should be a valid integer"),
        ({"max_model_len": 1 << 40}, "engine argument.*max_model_len"),
    ],
)
def test_what_vllm_refuses_has_its_name(arguments, words):
    with pytest.raises(SettingError, match=words) as refused:
        engine.start(DEMO / "model", "name", arguments, Grants())
    assert "\n" not in str(refused.value)


def test_what_would_lose_masks_is_refused_as_given_and_as_vllm_made_it(tmp_path):
    with pytest.raises(SettingError, match="engine argument enable_eplb: refused"):
        engine.configure(DEMO / "model", "name", {"enable_eplb": True})
    folder = random_checkpoint(tmp_path / "toy", num_experts=2)
    config = json.loads((folder / "config.json").read_text())
    architectures = {"architectures": ["FlexOlmoForCausalLM", "OlmoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | architectures))
    with pytest.raises(SettingError, match="the model's architecture is"):
        engine.configure(folder, "name", {})


@pytest.mark.parametrize("arguments", [{}, {"load_format": "auto"}])
def test_vllm_loads_the_files_that_were_checked(tmp_path, arguments):
    """Left to itself it loads those of another format, where they lie beside the index's own."""
    folder = random_checkpoint(tmp_path / "toy", num_experts=2, shards=2)
    shutil.copy(next(folder.glob("model-*")), folder / "consolidated.safetensors")
    loader = DefaultModelLoader(engine.configure(folder, "toy", arguments).load_config)
    _, loaded, *_ = loader._prepare_weights(str(folder), None, None, True, None)
    assert sorted(map(Path, loaded)) == Checkpoint(folder).files()


def test_cudas_build_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(engine, "current_platform", UnspecifiedPlatform())
    with pytest.raises(SettingError) as refused:
        engine.start(DEMO / "model", "name", {}, Grants())
    said = str(refused.value)
    assert said.startswith("no NVIDIA GPU is seen, and this vLLM is built for one: ")
    assert "`nvidia-smi`" in said
    assert "`make VARIANT=cpu`" in said
    assert "\n" not in said


def test_a_gpu_without_a_working_triton_is_a_line(monkeypatch):
    """vLLM would fall back to the runner that knows no masks; it does here, without a GPU."""
    monkeypatch.setattr(engine, "_worker", lambda: engine.GPU_WORKER)
    with pytest.raises(SettingError, match=r"holds the masks.*no Triton that works"):
        engine.start(DEMO / "model", "name", {}, Grants())


def test_another_platform_is_refused_by_name(monkeypatch):
    other = SimpleNamespace(is_cpu=bool, is_cuda=bool, is_unspecified=bool, device_name="tpu")
    monkeypatch.setattr(engine, "current_platform", other)
    with pytest.raises(SettingError, match=r"platform is 'tpu'; only cpu and cuda can be served"):
        engine.start(DEMO / "model", "name", {}, Grants())


def config(batch):
    return SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=batch))


def test_a_batch_smaller_than_a_step_is_a_line(monkeypatch):
    monkeypatch.setattr(engine, "least_rows", lambda: 8)
    engine._check_batch(config(8))
    with pytest.raises(
        SettingError, match="max_num_batched_tokens=7: on this processor at least 8"
    ):
        engine._check_batch(config(7))
    monkeypatch.setattr(engine, "least_rows", lambda: 1 << 20)
    with pytest.raises(SettingError, match="on this processor at least 1048576"):
        engine.configure(DEMO / "model", "name", {})
