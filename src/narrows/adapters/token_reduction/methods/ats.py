"""Adaptive token sampling."""

from narrows.adapters.token_reduction.methods.base import Pruning
from narrows.adapters.token_reduction.signals import Signals
from narrows.ops.token_sampling import TokenSample, inverse_transform_sample


class ATS(Pruning):
    """Tokens that evenly spaced quantiles of the significance fall on (Fayyaz et al. 2022, arXiv 2111.15667).

    Significant tokens cover many quantiles and are kept once, so that easy images keep fewer tokens. An image that fits
    the budget keeps what it has; with the whole budget, the paper's own setting, every image is sampled in every block.
    """

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The sampled tokens."""
        whole = count >= signals.positions
        return inverse_transform_sample(signals.significance, count, signals.grid_mask, sample_always=whole)
