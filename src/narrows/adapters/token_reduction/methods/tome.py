"""Token merging."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.adapters.token_reduction.methods.base import Merge, Merging
from narrows.adapters.token_reduction.methods.topk import greatest
from narrows.adapters.token_reduction.signals import Signals


class ToMe(Merging):
    """Bipartite soft matching with proportional attention (Bolya et al. 2023, arXiv 2210.09461, section 3).

    Every other token looks for the one most like it among the rest, by the cosine of their keys, mean over heads; the
    pairs most alike become one token, the mean of all that it stands for, at the place of the second.
    """

    proportional = True
    removes_at_most = 0.5

    def merge(self, signals: Signals, count: int) -> Merge:
        """Tokens that are left in their order; the prefix takes no part."""
        prefix, num_tokens = signals.prefix, signals.keys.shape[1]
        similarity = _similarity(signals.keys[:, prefix:])  # [B, sources, targets]
        best, target = similarity.max(-1)
        removed = greatest(best, num_tokens - prefix - count).ids  # of the sources

        goes = torch.zeros_like(best, dtype=torch.bool).scatter(1, removed, True)
        # Positions after the prefix: sources are 0, 2, 4 ..., targets 1, 3, 5 ...
        stays = torch.ones_like(signals.keys[:, prefix:, 0, 0], dtype=torch.bool)
        stays[:, ::2] = ~goes
        stays = torch.cat((stays.new_ones(stays.shape[0], prefix), stays), 1)
        slot = stays.cumsum(1) - 1
        into = slot.clone()
        into[:, prefix::2] = torch.where(goes, slot[:, prefix + 1 :: 2].gather(1, target), slot[:, prefix::2])

        ids = greatest(stays.float(), prefix + count).ids
        return Merge(into, _shares(into, prefix + count, signals.sizes), ids)


def _similarity(keys: Float[Tensor, "B m H d"]) -> Float[Tensor, "B s t"]:
    keys = F.normalize(keys.mean(2).float(), dim=-1)
    return keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)


def _shares(into: Tensor, num_slots: int, sizes: Tensor | None) -> Float[Tensor, "B n"]:
    """What part of its slot each token is, by the number of tokens it stands for."""
    sizes = torch.ones(into.shape, device=into.device) if sizes is None else sizes
    total = sizes.new_zeros(into.shape[0], num_slots).scatter_add(1, into, sizes)
    return sizes / total.gather(1, into)
