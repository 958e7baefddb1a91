"""What a picture says about a `Routing`: who owns a token, how much a carrier carries, whether tokens are only kept."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.routing import Routing

NOBODY = -1


def keeps_tokens(routing: Routing) -> bool:
    """Whether every carrier reads one token at most: then tokens were kept or dropped, not mixed."""
    return bool((routing.maps() > 0).sum((-2, -1)).amax() <= 1)


def owners(maps: Float[Tensor, "K h w"]) -> Int[Tensor, "h w"]:
    """For each token the carrier with the greatest share of it, `NOBODY` where no carrier reads it."""
    share, carrier = maps.max(0)
    return carrier.masked_fill(share <= 0, NOBODY)


def carried(maps: Float[Tensor, "K h w"]) -> Float[Tensor, "K"]:
    """The part of the tokens that each carrier carries: shares scaled to sum to 1 for each token, then averaged."""
    total = maps.sum(0)
    return (maps / total.masked_fill(total <= 0, 1)).mean((-2, -1))


def neighbour_colours(owner: Int[Tensor, "h w"]) -> dict[int, int]:
    """A colour number for every owner such that owners that touch differ, with as few numbers as a greedy pass needs.

    Many carriers cannot all have a colour of their own, but two that touch must not look like one.
    """
    pairs = torch.cat(
        [
            torch.stack([owner[:, :-1], owner[:, 1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1], owner[1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1, :-1], owner[1:, 1:]], -1).flatten(0, 1),
            torch.stack([owner[:-1, 1:], owner[1:, :-1]], -1).flatten(0, 1),
        ]
    )
    touching: dict[int, set[int]] = {int(carrier): set() for carrier in owner.unique() if carrier != NOBODY}
    for a, b in pairs.unique(dim=0).tolist():
        if a != b and NOBODY not in (a, b):
            touching[a].add(b)
            touching[b].add(a)
    colours: dict[int, int] = {}
    for carrier, neighbours in touching.items():
        taken = {colours.get(neighbour) for neighbour in neighbours}
        colours[carrier] = next(number for number in range(len(touching)) if number not in taken)
    return colours
