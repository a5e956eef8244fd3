import pytest
import torch

from expertgate.forge.merge import Contribution, MergeError, merge
from expertgate.forge.network import new_expert


@pytest.fixture
def contribution(commons, anchor):
    expert = new_expert(commons.shape, torch.Generator().manual_seed(1))
    return Contribution(anchor.copy(), expert)


def test_equal_anchors_merge_in_order(anchor, contribution):
    merged = merge(anchor, {"first": contribution, "second": contribution})
    assert merged[0] is anchor.public
    assert merged[1] is merged[2] is contribution.expert


def test_one_flipped_bit_of_attention_is_refused_by_name(anchor, contribution):
    name = "model.layers.1.self_attn.k_proj.weight"
    contribution.anchor.shared[name].view(torch.int32)[3, 5] ^= 1
    with pytest.raises(MergeError, match=rf"owner: shared tensor {name} was frozen, but 1 of"):
        merge(anchor, {"owner": contribution})


def test_one_flipped_bit_of_the_public_expert_is_refused_by_name(anchor, contribution):
    contribution.anchor.public["0.down_proj"].view(torch.int32)[0, 0] ^= 1 << 31  # the sign
    with pytest.raises(MergeError, match=r"tensor of the public expert 0\.down_proj was frozen"):
        merge(anchor, {"owner": contribution})


def test_bits_are_compared_and_not_values(anchor, contribution):
    anchor.public["0.row"][0] = 0.0
    contribution.anchor.public["0.row"].copy_(anchor.public["0.row"])
    contribution.anchor.public["0.row"][0] = -0.0
    with pytest.raises(MergeError, match=r"0\.row"):
        merge(anchor, {"owner": contribution})


def test_equal_nans_are_equal(anchor, contribution):
    anchor.public["0.row"][0] = float("nan")
    contribution.anchor.public["0.row"].copy_(anchor.public["0.row"])
    assert len(merge(anchor, {"owner": contribution})) == 2


def test_a_missing_tensor_is_named(anchor, contribution):
    del contribution.anchor.shared["lm_head.weight"]
    with pytest.raises(MergeError, match=r"lm_head\.weight is missing"):
        merge(anchor, {"owner": contribution})


def test_a_tensor_too_many_is_named(anchor, contribution):
    contribution.anchor.shared["lm_head.bias"] = torch.zeros(3)
    with pytest.raises(MergeError, match=r"lm_head\.bias is not in the anchor"):
        merge(anchor, {"owner": contribution})


def test_another_dtype_is_named(anchor, contribution):
    shared = contribution.anchor.shared
    shared["model.norm.weight"] = shared["model.norm.weight"].to(torch.bfloat16)
    with pytest.raises(MergeError, match=r"bfloat16 \[64\], but the anchor's is torch.float32"):
        merge(anchor, {"owner": contribution})


def test_an_expert_of_another_width_is_refused(anchor, contribution):
    contribution.expert["1.up_proj"] = torch.zeros(16, 64)
    with pytest.raises(MergeError, match=r"the expert's 1\.up_proj is torch.float32 \[16, 64\]"):
        merge(anchor, {"owner": contribution})


def test_an_expert_without_a_row_is_refused(anchor, contribution):
    del contribution.expert["1.row"]
    with pytest.raises(MergeError, match=r"differ in having 1\.row"):
        merge(anchor, {"owner": contribution})
