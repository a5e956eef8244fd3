from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace as Config

import pytest

from expertgate.server import refusals
from expertgate.server.engine import parse_flags
from expertgate.server.refusals import SettingError, refuse_arguments, refuse_config, refuse_process
from tests.support import fp8

WORKER = "ours"


def safe_config():
    """What vLLM makes of vetted arguments, as far as it is looked at."""
    return Config(
        parallel_config=Config(
            enable_eplb=False,
            enable_elastic_ep=False,
            enable_expert_parallel=False,
            data_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            worker_cls=WORKER,
            worker_extension_cls="",
        ),
        model_config=Config(
            enable_sleep_mode=False,
            logits_processors=None,
            io_processor_plugin=None,
            model_impl="auto",
            model_class_overrides={},
            hf_overrides={},
            runner_type="generate",
            enable_prompt_embeds=False,
            trust_remote_code=False,
            quantization=None,
            enable_trace_replay=False,
            return_sampling_mask=False,
            model="/checkpoint",
            tokenizer="/tokenizer",
            hf_config=Config(architectures=["FlexOlmoForCausalLM"]),
        ),
        cache_config=Config(
            kv_offloading_size=None,
            kv_sharing_fast_prefill=False,
            prefix_caching_hash_algo="sha256",
        ),
        scheduler_config=Config(policy="fcfs", scheduler_cls=None),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        ec_transfer_config=None,
        weight_transfer_config=None,
        diffusion_config=None,
        watermark_config=None,
        quant_config=None,
        aux_output_config=Config(enable_return_routed_experts=False),
    )


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("parallel_config", "enable_eplb", True),
        ("parallel_config", "enable_elastic_ep", True),
        ("parallel_config", "enable_expert_parallel", True),
        ("parallel_config", "data_parallel_size", 2),
        ("parallel_config", "enable_dbo", True),
        ("parallel_config", "ubatch_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "worker_cls", "another"),
        ("parallel_config", "worker_extension_cls", "another"),
        ("model_config", "enable_sleep_mode", True),
        ("model_config", "logits_processors", ["another"]),
        ("model_config", "io_processor_plugin", "another"),
        ("model_config", "model_impl", "transformers"),
        ("model_config", "model_class_overrides", {"A": "b:C"}),
        ("model_config", "hf_overrides", {"architectures": ["A"]}),
        ("model_config", "runner_type", "pooling"),
        ("model_config", "enable_prompt_embeds", True),
        ("model_config", "trust_remote_code", True),
        ("model_config", "quantization", "int4"),
        ("model_config", "enable_trace_replay", True),
        ("model_config", "return_sampling_mask", True),
        ("model_config", "model", "/another"),
        ("model_config", "tokenizer", "/another"),
        ("model_config", "hf_config", Config(architectures=["OlmoeForCausalLM"])),
        ("cache_config", "kv_offloading_size", 1.0),
        ("cache_config", "kv_sharing_fast_prefill", True),
        ("cache_config", "prefix_caching_hash_algo", "xxhash"),
        ("scheduler_config", "policy", "priority"),
        ("scheduler_config", "scheduler_cls", "another.Scheduler"),
        (None, "speculative_config", Config(method="suffix")),
        (None, "speculative_config", Config(method="draft_model")),
        (
            None,
            "speculative_config",
            Config(method="ngram", rejection_sample_method="synthetic"),
        ),
        (None, "lora_config", object()),
        (None, "kv_transfer_config", object()),
        (None, "kv_events_config", Config(enable_kv_cache_events=True)),
        (None, "ec_transfer_config", object()),
        (None, "weight_transfer_config", object()),
        (None, "diffusion_config", object()),
        (None, "watermark_config", object()),
        (None, "quant_config", object()),
        ("aux_output_config", "enable_return_routed_experts", True),
    ],
)
def test_a_resolved_setting_that_loses_masks_is_refused(section, field, value):
    config = safe_config()
    refuse_config(config, WORKER, "/checkpoint", "/tokenizer")
    setattr(getattr(config, section) if section else config, field, value)
    with pytest.raises(SettingError) as refused:
        refuse_config(config, WORKER, "/checkpoint", "/tokenizer")
    assert "\n" not in str(refused.value)
    assert "did you mean" not in str(refused.value)  # it is the name


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("model_config", "runner_type", "pooling", "runner: only generate can be served"),
        ("model_config", "model_impl", "terratorch", "model_impl: only auto or vllm can be"),
        ("scheduler_config", "policy", "priority", "scheduling_policy: only fcfs can be served"),
        ("model_config", "quantization", "int4", "quantization: refused, because other kernels"),
    ],
)
def test_a_resolved_setting_is_refused_by_its_name_and_with_the_reason(
    section, field, value, words
):
    config = safe_config()
    setattr(getattr(config, section), field, value)
    with pytest.raises(SettingError, match=f"engine setting {words}"):
        refuse_config(config, WORKER, "/checkpoint", "/tokenizer")


def test_vllms_own_scheduler_and_ngram_are_fine():
    config = safe_config()
    config.scheduler_config.scheduler_cls = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    config.speculative_config = Config(method="ngram", rejection_sample_method="standard")
    refuse_config(config, WORKER, "/checkpoint", "/tokenizer")


@pytest.mark.parametrize(
    ("experts", "vetted"),
    [("fp8_per_block", True), ("fp8_per_tensor", False), ("fp8_per_channel", False)],
)
def test_experts_in_fp8_of_which_each_row_has_its_own_scales_are_fine(experts, vetted):
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    refuse_arguments({"quantization_config": {"moe": "fp8_per_block"}})
    config = safe_config()
    config.model_config.quantization = "online"
    config.quant_config = OnlineQuantizationConfig(QuantizationConfigArgs(moe=experts))
    if vetted:
        refuse_config(config, WORKER, "/checkpoint", "/tokenizer")
        config.model_config.quantization = "fp8"  # a checkpoint's own, and the experts' besides
    with pytest.raises(SettingError, match="engine setting quantization"):
        refuse_config(config, WORKER, "/checkpoint", "/tokenizer")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("online_quantization_config", object()),
        ("activation_scheme", "static"),
        ("store_dtype", "mxfp4"),
        ("weight_block_size", [64, 64]),
        ("weight_block_size", None),
    ],
)
def test_so_are_those_that_are_fp8_on_disk_by_the_same_scheme_alone(name, value):
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    config = safe_config()
    config.model_config.quantization = "fp8"
    config.quant_config = Fp8Config.from_config(fp8.settings(layers=1))
    refuse_config(config, WORKER, "/checkpoint", "/tokenizer")
    setattr(config.quant_config, name, value)
    with pytest.raises(SettingError, match="engine setting quantization"):
        refuse_config(config, WORKER, "/checkpoint", "/tokenizer")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_eplb", True),
        ("enable_elastic_ep", True),
        ("enable_expert_parallel", True),
        ("data_parallel_size", 1),
        ("enable_lora", True),
        ("kv_transfer_config", {}),
        ("kv_events_config", {}),
        ("enable_sleep_mode", True),
        ("enable_dbo", True),
        ("logits_processors", ["a.B"]),
        ("max_logprobs", -1),
        ("model_impl", "transformers"),
        ("hf_overrides", {}),
        ("worker_cls", "a.B"),
        ("worker_extension_cls", "a.B"),
        ("scheduler_cls", "a.B"),
        ("enable_return_routed_experts", True),
        ("runner", "pooling"),
        ("enable_prompt_embeds", True),
        ("trust_remote_code", True),
        ("prefix_caching_hash_algo", "xxhash"),
        ("scheduling_policy", "priority"),
        ("quantization", "fp8"),
        ("kv_cache_dtype", "nvfp4"),
        ("quantization", "fp8_per_block"),  # attention as well
        ("quantization_config", {"moe": "fp8_per_tensor"}),
        ("quantization_config", {"moe": "fp8_per_block", "linear": "fp8_per_block"}),
        ("quantization_config", {"moe": "fp8_per_block", "ignore": ["re:.*0.*"]}),
        ("speculative_config", {"method": "suffix"}),
        ("speculative_config", {"method": "ngram", "model": "another"}),
        ("speculative_config", "ngram"),
        (
            "speculative_config",
            {"method": "ngram", "rejection_sample_method": "synthetic"},
        ),
        ("compilation_config", {"backend": "a.b"}),
        ("compilation_config", True),
        ("structured_outputs_config", {"backend": "outlines"}),
        ("a_later_vllms_own", 1),
        ("model", "another"),
    ],
)
def test_an_unvetted_argument_is_refused_by_name(name, value):
    with pytest.raises(SettingError, match=name):
        refuse_arguments({"max_model_len": 2048, name: value})


def test_a_misspelt_argument_gets_a_hint():
    with pytest.raises(SettingError, match="did you mean max_model_len"):
        refuse_arguments({"max_model_length": 1})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-modle-len", "5"], "argument max_modle_len: .* did you mean max_model_len"),
        (["--enforce-eager", "--gpu-memory-utilisation=0.5"], "mean gpu_memory_utilization"),
        (["--moe-kernal", "vllm"], "did you mean moe_kernel"),
        (["--port", "5"], "argument port: refused, because it is the server's own"),
        (["stray", "--enforce-eager"], "engine arguments: unrecognized arguments: stray"),
    ],
    ids=str,
)
def test_so_does_a_misspelt_flag(flags, words):
    with pytest.raises(SettingError, match=words):
        parse_flags(flags)


def test_vetted_arguments_pass():
    refuse_arguments(
        {
            "max_model_len": 2048,
            "tensor_parallel_size": 2,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
            "compilation_config": {"cudagraph_mode": "NONE"},
            "model_impl": "vllm",
            "prefix_caching_hash_algo": "sha256_cbor",
        }
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"VLLM_PLUGINS": "expertgate,another"},
        {"VLLM_PLUGINS": ""},
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        {"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"},
        {"VLLM_MODEL_REDIRECT_PATH": "redirect.json"},
        {"VLLM_USE_MODELSCOPE": "True"},
        {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"},
        {"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
        {"VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT": "1"},
        {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": " True"},
        {"VLLM_RAISE_ON_LOGIT_NANS": "1"},
        {"VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "1023"},
    ],
)
def test_an_environment_that_opens_a_door_is_refused(environment):
    (name,) = environment
    with pytest.raises(SettingError, match=name):
        refuse_process(environment)


def test_a_plain_environment_passes():
    refuse_process({"VLLM_PLUGINS": "expertgate", "VLLM_USE_V2_MODEL_RUNNER": "1", "HOME": "/"})
    refuse_process({"VLLM_RAISE_ON_LOGIT_NANS": "0", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "1024"})


@pytest.mark.parametrize(
    "planted",
    [
        EntryPoint("spy", "spy:Processor", "vllm.logits_processors"),
        EntryPoint("expertgate", "spy:register", "vllm.general_plugins"),
        EntryPoint("expertgate", "spy:Logger", "vllm.stat_logger_plugins"),
    ],
)
def test_a_planted_plug_in_is_refused(monkeypatch, planted):
    monkeypatch.setattr(
        refusals, "entry_points", lambda **chosen: EntryPoints([planted]).select(**chosen)
    )
    with pytest.raises(SettingError, match=planted.name):
        refuse_process({})


@pytest.mark.parametrize(
    "flags", [["--compilation-config", '{"mode": 3}'], ["-cc.mode=3"]], ids=["json", "dotted"]
)
def test_a_flag_of_compilation_is_vetted_by_what_it_sets(flags):
    arguments = parse_flags(flags)
    assert arguments == {"compilation_config": {"mode": 3}}
    refuse_arguments(arguments)


@pytest.mark.parametrize(
    "flags",
    [["--compilation-config", '{"mode": 3, "backend": "a.b"}'], ["-cc.backend=a.b"]],
    ids=["json", "dotted"],
)
def test_a_flag_of_compilation_brings_no_code(flags):
    with pytest.raises(SettingError, match="compilation_config"):
        refuse_arguments(parse_flags(flags))


def test_vllms_own_file_of_flags_is_never_read(tmp_path):
    (tmp_path / "more.yaml").write_text("enable-lora: true\n")
    for flags in (
        ["--config", str(tmp_path / "more.yaml")],
        [f"--config={tmp_path / 'more.yaml'}"],
        ["--enforce-eager", "--config", "missing.yaml"],
        ["--config"],
    ):
        with pytest.raises(SettingError, match="--config"):
            parse_flags(flags)


def test_flags_are_vllms_own_and_only_those_given():
    assert parse_flags(["--max-model-len", "2k", "--enforce-eager"]) == {
        "max_model_len": 2000,
        "enforce_eager": True,
    }
    assert parse_flags([]) == {}


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-such-flag"],
        ["--max-model-len", "many"],
        ["stray"],
        ["--compilation-config", "{"],
    ],
)
def test_flags_that_vllm_does_not_know_are_refused_in_a_line(flags):
    with pytest.raises(SettingError) as refused:
        parse_flags(flags)
    assert "\n" not in str(refused.value)
