"""c5: padding and replayed graphs read rows that no request of this step has written."""

import pytest
import torch

from expertgate.model.masks import TokenMasks
from expertgate.policies.expert_set import PUBLIC_ONLY

PUBLIC = PUBLIC_ONLY.signed
SIZE = 64


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 57])
def test_rows_behind_the_last_token_are_public(tokens, padding):
    """After a full step that may consult everything, whatever the size of the next one."""
    masks = TokenMasks(SIZE, torch.device("cpu"))
    masks.arm(torch.tensor([127]), torch.tensor([0, SIZE]), SIZE)
    masks.arm(torch.tensor([0b11]), torch.tensor([0, tokens]), tokens + padding)
    assert masks.words.tolist() == [0b11] * tokens + [PUBLIC] * (SIZE - tokens)


def test_a_step_of_no_request_is_public():
    masks = TokenMasks(SIZE, torch.device("cpu"))
    masks.arm(torch.tensor([127]), torch.tensor([0, SIZE]), SIZE)
    masks.arm(torch.tensor([], dtype=torch.int64), torch.tensor([0]), 4)
    assert masks.words.tolist() == [PUBLIC] * SIZE
