"""`Linear` is `nn.Linear`."""

import torch
from torch import nn

from narrows.layers.linear import Linear
from tests.support import assert_close, parameter_gradients


def test_linear_has_the_parameters_and_numbers_of_its_parent() -> None:
    ours, theirs = Linear(32, 48), nn.Linear(32, 48)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(4, 200, 32)  # enough for the kernel to be another
    assert_close(ours(tokens), theirs(tokens))
    expected = parameter_gradients(theirs, theirs(tokens))
    for name, gradient in parameter_gradients(ours, ours(tokens)).items():
        assert_close(gradient, expected[name])
