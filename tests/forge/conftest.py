import pytest
import torch

from expertgate.forge.corpus import Sampler
from expertgate.forge.network import Shape, new_expert, new_shared
from expertgate.forge.tokenizer import learn
from expertgate.forge.topics import closed_wordings, public_topics
from expertgate.forge.train import Anchor, Commons

# So small a network gains nothing from a second thread, and waits for it where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def commons():
    topics, wordings = public_topics(0), closed_wordings()
    sampler = Sampler("test")
    drawn = [sampler.public(topics, wordings) for _ in range(300)]
    tokenizer = learn((text for e in drawn for text in (e.question, e.answer)), 400)
    shape = Shape(vocab=len(tokenizer), hidden=64, inner=32, layers=3, heads=2)
    return Commons(shape, tokenizer, topics, wordings)


@pytest.fixture
def anchor(commons):
    generator = torch.Generator().manual_seed(0)
    return Anchor(new_shared(commons.shape, generator), new_expert(commons.shape, generator))
