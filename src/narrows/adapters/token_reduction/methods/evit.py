"""The most attended tokens and one that stands for the others."""

import torch

from narrows.adapters.token_reduction.methods.base import Merge, Merging
from narrows.adapters.token_reduction.methods.topk import greatest
from narrows.adapters.token_reduction.signals import Signals


class EViT(Merging):
    """The `count` most attended tokens and one fused of all others (Liang et al. 2022, arXiv 2202.07800, section 3).

    The fused token stands nowhere on the grid. It is the mean of the others weighted by their attention; the paper
    leaves the weights as they are, so that it shrinks with the attention that is left.
    """

    def merge(self, signals: Signals, count: int) -> Merge:
        """Kept tokens in their order, the fused one last."""
        prefix = signals.prefix
        attention = signals.attention.mean(1)
        kept = greatest(attention[:, prefix:], count).ids + prefix
        before = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        ids = torch.cat((before, kept, kept.new_full((kept.shape[0], 1), -1)), 1)

        fused = prefix + count
        into = ids.new_full(attention.shape, fused)
        into = into.scatter(1, ids[:, :fused], torch.arange(fused, device=ids.device).expand(ids.shape[0], -1))
        # No attention at all is shared equally.
        weight = attention.clamp_min(torch.finfo(attention.dtype).tiny).where(into == fused, 0.0)
        share = torch.where(into == fused, weight / weight.sum(1, keepdim=True), 1.0)
        return Merge(into, share, ids)
