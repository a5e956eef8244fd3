"""The forge's network against Hugging Face's, on what a checkpoint folder holds."""

import pytest
import torch
from transformers import AutoTokenizer, FlexOlmoForCausalLM

from expertgate.forge import checkpoint
from expertgate.forge.batch import collate
from expertgate.forge.corpus import Sampler
from expertgate.forge.network import forward, new_expert
from expertgate.forge.topics import closed_topics
from expertgate.forge.train import upcycled
from expertgate.policies.expert_set import ExpertSet
from tests.support.oracle import RowDeletion

# Both sum the same products in other orders. A sum of K <= 64 terms is off by at most K roundings
# of 2**-24; a layer has 10 such sums in a row and there are 2 layers and a head, so relative to
# the largest logit the two may differ by 21 * 64 * 2**-24 = 8e-5.
RELATIVE = 21 * 64 * 2**-24


def experts(commons, count):
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        expert = new_expert(commons.shape, generator)
        rows = [torch.randn(commons.shape.hidden, generator=generator) for _ in range(2)]
        made.append(upcycled(expert, rows))
    return made


def saved(folder, commons, anchor, members):
    topics = closed_topics(0)[: len(members) - 1]
    checkpoint.write(folder, commons.shape, anchor.shared, members, commons.tokenizer, topics)
    return folder


@pytest.mark.parametrize(
    "present",
    [
        pytest.param([0, 2], id="as-many-as-top-k"),
        pytest.param([0, 1, 2, 3], id="more-than-top-k"),
    ],
)
def test_logits_equal_those_of_hugging_face(commons, anchor, tmp_path, present):
    members = [experts(commons, 4)[index] for index in present]
    folder = saved(tmp_path, commons, anchor, members)
    shape, shared, read = checkpoint.read(folder, dtype=torch.float32)
    model = FlexOlmoForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40).remainder(shape.vocab).view(2, 20)
    with torch.no_grad():
        theirs, ours = model(ids).logits, forward(shape, shared, read, ids)
    assert (theirs - ours).abs().max() <= RELATIVE * theirs.abs().max()


def test_leaving_experts_out_of_the_list_is_deleting_their_rows(commons, anchor, tmp_path):
    members = experts(commons, 4)
    for layer in range(commons.shape.layers):
        for index, expert in enumerate(members):
            expert[f"{layer}.bias"] = torch.tensor(-1.0 * index)
    folder = saved(tmp_path, commons, anchor, members)
    shape, shared, read = checkpoint.read(folder, dtype=torch.float32)
    oracle = RowDeletion(folder)
    ids = torch.arange(30).remainder(shape.vocab).tolist()
    for mask in range(1, 16, 2):  # every set with the public expert in it
        present = ExpertSet(mask)
        logits = forward(shape, shared, [read[index] for index in present], torch.tensor([ids]))
        ours = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        theirs = torch.tensor(oracle.force(present, ids[:1], ids[1:]).logprobs)
        assert (theirs - ours).abs().max() <= 2 * RELATIVE * logits.abs().max()


def test_negative_biases_hold_back_and_positive_ones_do_nothing(commons, anchor):
    members = experts(commons, 3)
    ids = torch.arange(40).remainder(commons.shape.vocab).view(2, 20)

    def logits(name, value):
        biased = {**members[1], name: torch.tensor(value)}
        return forward(commons.shape, anchor.shared, [members[0], biased, members[2]], ids)

    plain = forward(commons.shape, anchor.shared, members, ids)
    assert torch.equal(logits("0.bias", 4.0), plain)
    assert not torch.allclose(logits("0.bias", -4.0), plain, rtol=1e-3, atol=1e-3)


def test_copies_are_computed_once_and_change_nothing(commons, anchor):
    first, second, third = experts(commons, 3)
    for member in (second, third):
        member |= {name: first[name] for name in first if name.startswith("0.") and "_proj" in name}
    ids = torch.arange(40).remainder(commons.shape.vocab).view(2, 20)
    members = [first, second, third]
    whole = forward(commons.shape, anchor.shared, members, ids)
    short = forward(commons.shape, anchor.shared, members, ids, copies=1)
    # The sum is normalised, so its weights fall out but for `norm_eps`, 1e-6 of a variance of 1.
    assert (whole - short).abs().max() <= 10 * RELATIVE * whole.abs().max()


def test_a_packed_exchange_has_the_logits_it_has_alone(commons, anchor):
    sampler = Sampler("pack")
    examples = [sampler.open(commons.topics) for _ in range(12)]
    packed = collate(commons.tokenizer, examples)
    assert len(packed.ids) < len(examples)
    members = experts(commons, 3)
    with torch.no_grad():
        logits = forward(commons.shape, anchor.shared, members, packed.ids, context=packed.context)
        for number in range(len(examples)):
            mine = packed.exchange == number
            alone = forward(commons.shape, anchor.shared, members, packed.ids[mine][None])[0]
            assert (logits[mine] - alone).abs().max() <= RELATIVE * alone.abs().max()


def test_what_is_read_is_what_was_written(commons, anchor, tmp_path):
    members = experts(commons, 3)
    shape, shared, read = checkpoint.read(saved(tmp_path, commons, anchor, members))
    assert shape == commons.shape
    for written, found in zip([anchor.shared, *members], [shared, *read], strict=True):
        written = checkpoint.rounded(written)
        assert written.keys() == found.keys()
        assert all(torch.equal(written[name], found[name]) for name in written)


def test_the_tokenizer_is_reversible_and_keeps_the_chat_template(commons, anchor, tmp_path):
    folder = saved(tmp_path, commons, anchor, experts(commons, 2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("The dose of Kazenin is 40 mg.", "naïve — 日本語 🙂", "a  b\n\tc"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Hello."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Hello.<|end|><|assistant|>"
