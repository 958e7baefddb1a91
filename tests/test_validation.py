"""Checks of arguments that several rooms share."""

import numpy as np
import pytest
import torch

from narrows.errors import InvalidArgument, InvalidType
from narrows.validation import as_tokens, check_positive


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(1), torch.tensor(1), torch.tensor([1])], ids=repr)
def test_any_integer_type_is_a_positive_integer(value: object) -> None:
    check_positive(heads=value)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 1.0, np.float32(1), "1", None], ids=repr)
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(InvalidType, match="heads: expected a positive integer, got"):
        check_positive(heads=value)


@pytest.mark.parametrize("value", [0, -1, np.int8(0)], ids=repr)
def test_the_first_that_is_not_positive_is_named(value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"heads: expected a positive integer, got {value}"):
        check_positive(dim=1, heads=value, depth=0)


def test_images_are_tokens_row_by_row() -> None:
    images, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) > 0.5
    tokens, token_mask, grid = as_tokens(images, mask, dim=3)
    assert grid == (4, 5)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[:, 5 * 2 + 3], images[:, :, 2, 3])
    assert token_mask is not None
    assert torch.equal(token_mask[:, 5 * 2 + 3], mask[:, 2, 3])
    same, none, no_grid = as_tokens(tokens, None, dim=3)
    assert same is tokens
    assert none is no_grid is None
