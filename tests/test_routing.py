"""`Routing`, the record of where tokens went."""

import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from tests.support import assert_close


@pytest.mark.parametrize("joint_heads", [False, True])
def test_maps_divide_each_token_once_however_heads_share_it(joint_heads: bool) -> None:
    logits = torch.randn(2, 3, 4, 7)  # a class token before a grid of 2 x 3
    weights = logits.flatten(1, 2).softmax(1).view_as(logits) if joint_heads else logits.softmax(2)
    routing = Routing(weights, carriers="slots", joint_heads=joint_heads).with_grid((2, 3), prefix=1)
    maps = routing.maps()
    assert maps.shape == (2, 4, 2, 3)
    assert_close(maps.sum(1), torch.ones(2, 2, 3))
    total = weights.sum(1) if joint_heads else weights.mean(1)
    assert torch.equal(maps[:, 1, 1, 2], total[:, 1, 6])
    assert routing.detach().joint_heads == joint_heads


@pytest.mark.compiled  # jaxtyping would speak first
def test_messages() -> None:
    weights = torch.ones(1, 1, 2, 6)
    with pytest.raises(InvalidArgument, match=r"weights: expected shape \[B, H, K, N\]"):
        Routing(weights[0], carriers="slots")
    with pytest.raises(InvalidArgument, match=r"grid: expected height \* width \+ prefix equal to the 6 tokens"):
        Routing(weights, carriers="slots", grid=(2, 2))
    with pytest.raises(InvalidArgument, match="grid: expected a routing whose tokens stand on a grid"):
        Routing(weights, carriers="slots").maps()
