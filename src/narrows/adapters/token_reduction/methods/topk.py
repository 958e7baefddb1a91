"""The tokens that get most attention."""

from jaxtyping import Float
from torch import Tensor

from narrows.adapters.token_reduction.methods.base import Pruning
from narrows.adapters.token_reduction.signals import Signals
from narrows.ops.token_sampling import TokenSample
from narrows.ops.token_sampling.common import compact


class TopK(Pruning):
    """The `count` tokens with the greatest attention of whoever reads the image, the mean over heads.

    The choice of EViT (Liang et al. 2022, arXiv 2202.07800) without its fused token; a strong baseline among ten
    methods (Haurum et al. 2023, arXiv 2308.04657).
    """

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The greatest."""
        return greatest(signals.attention[..., signals.prefix :].mean(1), count)


def greatest(scores: Float[Tensor, "B m"], count: int) -> TokenSample:
    """The positions of the `count` greatest scores, ascending."""
    best = scores.topk(count, dim=1).indices
    return compact(scores.new_zeros(scores.shape, dtype=best.dtype).scatter(1, best, 1).bool(), count)
