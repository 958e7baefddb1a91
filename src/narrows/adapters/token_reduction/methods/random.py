"""Tokens at random: what every other method has to beat."""

import torch

from narrows.adapters.token_reduction.methods.base import Pruning
from narrows.adapters.token_reduction.methods.topk import greatest
from narrows.adapters.token_reduction.signals import Signals
from narrows.ops.token_sampling import TokenSample

_PRIME = 2**31 - 1


class Random(Pruning):
    """`count` tokens at random: drawn anew for each image while training, the same for every image in evaluation.

    Args:
        seed: decides which tokens evaluation keeps.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The drawn tokens."""
        batch, num_tokens = signals.tokens.shape[:2]
        shape, device = (batch, num_tokens - signals.prefix), signals.tokens.device
        if signals.training:
            return greatest(torch.rand(shape, generator=signals.generator, device=device), count)
        # A hash of the position, no generator, so that it can be traced; whole numbers are the same everywhere.
        place = torch.arange(1, shape[1] + 1, device=device)
        hashed = (place * 48271 + self.seed) % _PRIME
        hashed = (hashed * hashed % _PRIME * 16807 + place) % _PRIME
        return greatest((hashed * hashed % _PRIME).double().expand(shape), count)
