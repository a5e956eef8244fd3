import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

from expertgate.model.checkpoint import Checkpoint, CheckpointError, locate
from expertgate.server.cli import cli
from tests.support import fp8
from tests.support.checkpoints import random_checkpoint

NAMED = fp8.settings(2)["modules_to_not_convert"]
Q_PROJ = "model.layers.1.self_attn.q_proj"
UP = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture
def folder(tmp_path):
    return random_checkpoint(tmp_path / "one", num_experts=3, layers=2, biases=True)


@pytest.fixture
def quantised(tmp_path):
    plain = random_checkpoint(tmp_path / "plain", num_experts=3, layers=2, biases=True)
    return fp8.quantised(plain, tmp_path / "quantised")


def test_digests_do_not_depend_on_how_files_are_cut(tmp_path):
    one = random_checkpoint(tmp_path / "one", num_experts=3)
    three = random_checkpoint(tmp_path / "three", num_experts=3, shards=3)
    assert len(list(three.glob("*.safetensors"))) > 1
    assert Checkpoint(one).expert_digests(range(3)) == Checkpoint(three).expert_digests(range(3))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", None),
        ("model.layers.0.mlp.experts.2.down_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", 2),
        ("model.layers.0.mlp.gate.expert_bias", 1),
    ],
)
def test_one_changed_bit_changes_its_experts_digest_and_no_other(folder, name, row):
    before = Checkpoint(folder).expert_digests(range(3))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = tensors[name] if row is None else tensors[name][row]
    changed.view(torch.int16).view(-1)[-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    after = Checkpoint(folder).expert_digests(range(3))
    assert {i for i in range(3) if before[i] != after[i]} == {2}


def test_the_same_bytes_that_are_read_otherwise_are_another_expert(folder):
    name = f"{UP}.weight"
    weight = load_file(folder / "model.safetensors")[name].bfloat16()
    digests = set()
    for read in (weight, weight.view(torch.float16), weight.view(128, 256)):
        change(folder, lambda tensors, read=read: tensors.update({name: read}))
        digests.update(Checkpoint(folder).expert_digests([2]).values())
    assert len(digests) == 3


def test_a_quantised_expert_is_its_weights_and_their_scales(quantised):
    before = Checkpoint(quantised).expert_digests(range(3))
    said = CliRunner().invoke(cli, ["experts", "digest", str(quantised)])
    assert said.output == "".join(f"{i}  {sha256}\n" for i, sha256 in before.items())
    path = quantised / "model.safetensors"
    clean = load_file(path)
    for name in ("weight", "weight_scale_inv"):
        for part in ("gate_proj", "up_proj", "down_proj"):
            tensors = {name: tensor.clone() for name, tensor in clean.items()}
            changed = tensors[f"model.layers.1.mlp.experts.2.{part}.{name}"]
            changed.view(torch.uint8).view(-1)[-1] ^= 1
            save_file(tensors, path, metadata={"format": "pt"})
            after = Checkpoint(quantised).expert_digests(range(3))
            assert {i for i in range(3) if before[i] != after[i]} == {2}


def test_a_checkpoint_whose_experts_alone_are_fp8_by_blocks_is_fine(quantised):
    Checkpoint(quantised).check_weights()
    for own in (
        {"fmt": "e4m3"},  # as DeepSeek's say
        json.loads(FineGrainedFP8Config(**fp8.settings(2)).to_json_string()),
        {"ignored_layers": NAMED, "modules_to_not_convert": []},
        {"ignored_layers": []},
    ):
        configure(quantised, fp8.settings(2) | own)
        Checkpoint(quantised).check_weights()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"quant_method": "gptq"}, 'quant_method is "gptq", but this server serves "fp8": of what'),
        ({"quant_method": "compressed-tensors"}, 'quant_method is "compressed-tensors"'),
        ({"activation_scheme": "static"}, 'scheme is "static", but this server serves "dynamic"'),
        ({"activation_scheme": None}, "activation_scheme is null"),
        ({"weight_block_size": None}, "weight_block_size is null"),  # a scale for all of it
        ({"weight_block_size": [64, 64]}, r"serves \[128, 128\]"),
        ({"fmt": "e5m2"}, "fmt is"),
        ({"scale_fmt": "ue8m0"}, 'scale_fmt is "ue8m0", but this server serves "float"'),
        ({"dequantize": True}, "dequantize is true"),
        ({"modules_to_convert": ["mlp"]}, r"modules_to_convert is \["),
        ({"store_dtype": "mxfp4"}, "store_dtype isn't among what can be served, which is quant_"),
        ({"kv_cache_scheme": {}}, "kv_cache_scheme isn't among"),
        ({"modules_to_not_convert": None}, "_convert doesn't name model.layers.0.self_attn.q_proj"),
        ({"modules_to_not_convert": ["self_attn"]}, "doesn't name model.layers.0.self_attn.q_proj"),
        ({"ignored_layers": ["lm_head"]}, "ignored_layers doesn't name"),
        ({"modules_to_not_convert": "self_attn"}, "must be a list of names"),
        ({"modules_to_not_convert": [5]}, "must be a list of names"),
        (
            {"modules_to_not_convert": [*NAMED, "model.layers.0.mlp.experts"]},
            "names model.layers.0.mlp.experts: all experts must be quantised",
        ),
        (  # by which vLLM takes none of the layer's for quantised
            {"modules_to_not_convert": [*NAMED, UP]},
            f"names {UP}: all experts must be quantised",
        ),
    ],
)
def test_another_quantisation_is_refused_by_name(quantised, own, said):
    configure(quantised, fp8.settings(2) | own)
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{said}"):
        Checkpoint(quantised)


@pytest.mark.parametrize("name", ["quant_method", "activation_scheme", "weight_block_size"])
def test_what_says_how_experts_are_quantised_must_be_there(quantised, name):
    configure(quantised, {n: value for n, value in fp8.settings(2).items() if n != name})
    with pytest.raises(CheckpointError, match=f"{name} is null"):
        Checkpoint(quantised)


@pytest.mark.parametrize("name", [name for name in NAMED if "self_attn" in name])
def test_each_projection_of_attention_is_to_be_named(quantised, name):
    named = [other for other in NAMED if other != name]
    configure(quantised, fp8.settings(2) | {"modules_to_not_convert": named})
    with pytest.raises(CheckpointError, match=f"doesn't name {name}: only experts may be quant"):
        Checkpoint(quantised)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
def test_blocks_that_are_not_whole_are_refused(quantised, name):
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {name: 192}))
    with pytest.raises(CheckpointError, match=f"{name} is 192, but .* blocks of 128"):
        Checkpoint(quantised)


def test_a_quantisation_that_is_no_object_is_refused(quantised):
    configure(quantised, [])
    with pytest.raises(CheckpointError, match="quantization_config holds no JSON object"):
        Checkpoint(quantised)


def configure(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


@pytest.mark.parametrize(
    "name",
    [
        f"{UP}.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing_is_named(folder, name):
    """Of many a weight that it isn't given vLLM says nothing, and serves what lay in memory."""
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        Checkpoint(folder).check_weights()


@pytest.mark.parametrize("shape", [(128, 128), (256, 64)])
def test_an_expert_that_is_too_small_is_named(folder, shape):
    """vLLM fills a part of the weight, and serves what lay in memory as the rest."""
    change(folder, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(shape)}))
    said = rf"{UP}.weight is F32 \[{shape[0]}, {shape[1]}\], but .* should be .* \[256, 128\]"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(folder).check_weights()


@pytest.mark.parametrize("kind", ["folder", "quantised"])
def test_a_head_is_missed_unless_it_is_the_embeddings(kind, request):
    folder = request.getfixturevalue(kind)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    Checkpoint(folder).check_weights()  # it may be there all the same
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    Checkpoint(folder).check_weights()
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"):
        Checkpoint(folder).check_weights()


FP8_ROWS = torch.zeros(128, 128, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{UP}.weight_scale_inv": None}, f"tensor {UP}.weight_scale_inv is missing"),
        ({f"{UP}.weight_scale_inv": torch.ones(1, 1)}, r"is F32 \[1, 1\], .* F32 \[2, 1\]"),
        ({f"{UP}.weight_scale_inv": torch.ones(2, 1).half()}, "is F16 .* should be F32"),
        ({f"{UP}.weight": torch.zeros(256, 128)}, "is F32 .* should be F8_E4M3"),
        ({f"{Q_PROJ}.weight": FP8_ROWS}, f"{Q_PROJ}.weight is F8_E4M3"),
        ({f"{Q_PROJ}.weight_scale_inv": torch.ones(1, 1)}, "there is no place for tensor"),
        ({f"{UP}.input_scale": torch.ones(1)}, f"no place for tensor {UP}.input_scale"),
        ({"model.layers.0.self_attn.attn.k_scale": torch.ones(1)}, "no place for tensor"),
    ],
)
def test_tensors_that_do_not_fit_a_quantised_checkpoint_are_named(quantised, tensors, said):
    def put(found):
        for name, tensor in tensors.items():
            found.pop(name, None)
            if tensor is not None:
                found[name] = tensor

    change(quantised, put)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(quantised).check_weights()


def test_fp8_of_which_the_configuration_says_nothing_is_refused(quantised):
    """Its scales would be passed over."""
    configure(quantised, None)
    with pytest.raises(CheckpointError, match="is F8_E4M3"):
        Checkpoint(quantised).check_weights()
    with pytest.raises(CheckpointError, match="unexpected dtype F8_E4M3"):
        Checkpoint(quantised).expert_digests([0])


def change(folder, how):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "serves FlexOlmoForCausalLM"),
        ({"architectures": None}, "serves FlexOlmoForCausalLM"),
        ({"architectures": 5}, "serves FlexOlmoForCausalLM"),
        ({"architectures": "FlexOlmoForCausalLM"}, "serves FlexOlmoForCausalLM"),
        ({"num_experts": 65}, "1 to 64"),
        ({"num_experts": 0}, "num_experts is 0;"),
        ({"num_experts": None}, "a whole number"),
        ({"num_experts": "7"}, "a whole number"),
        ({"num_hidden_layers": True}, "a whole number"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", but this server serves "silu"'),
        ({"hidden_act": None}, "hidden_act is null"),
        ({"attention_bias": True}, "attention_bias is true, but this server serves false"),
    ],
)
def test_another_model_is_refused(tmp_path, config, said):
    config = {"architectures": ["FlexOlmoForCausalLM"]} | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_broken_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(folder).expert_digests([0])


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_a_broken_weights_file_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint(folder).expert_digests([0])


def test_a_truncated_weights_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(CheckpointError, match="ends within tensor"):
        Checkpoint(folder).expert_digests(range(3))


def test_an_engine_would_find_all_weights_or_it_is_told(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.check_weights()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends within tensor"):
        Checkpoint(folder).check_weights()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(folder).check_weights()


def test_a_tensor_found_twice_is_refused(folder):
    """Else the digest could be of one copy, and the engine serve the other."""
    shutil.copy(folder / "model.safetensors", folder / "zz.safetensors")
    with pytest.raises(CheckpointError, match=r"is also in model\.safetensors"):
        Checkpoint(folder).expert_digests([0])


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    """vLLM doesn't load them either."""
    folder = random_checkpoint(tmp_path, num_experts=3, shards=3)
    before = Checkpoint(folder).expert_digests(range(3))
    (folder / "zz.safetensors").write_bytes(b"anything")
    assert Checkpoint(folder).expert_digests(range(3)) == before


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "no map of weights"),
        ("[]", "no map of weights"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "is no file of this folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "No such file"),
    ],
)
def test_a_broken_index_is_named(folder, index, said):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(folder).expert_digests([0])


def test_an_index_that_cannot_be_read_is_named(folder):
    (folder / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json: Is a directory"):
        Checkpoint(folder).check_weights()


def test_a_folder_is_found(folder):
    assert locate(str(folder)) == folder.resolve()


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "absent", "a/b/c"])
def test_what_can_be_no_hub_id_is_a_missing_folder(model):
    with pytest.raises(CheckpointError, match="no such model folder"):
        locate(model)


def test_a_hub_id_that_cannot_be_fetched_says_so():
    """The tests run offline; the Hub's client then says that it may not ask."""
    with pytest.raises(CheckpointError, match="could not be fetched from the Hub") as caught:
        locate("nobody/no-such-model", "main")
    assert "\n" not in str(caught.value)
