import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertgate.model.checkpoint import Checkpoint, CheckpointError, locate
from tests.support.checkpoints import random_checkpoint


@pytest.fixture
def folder(tmp_path):
    return random_checkpoint(tmp_path / "one", num_experts=3, layers=2, biases=True)


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
