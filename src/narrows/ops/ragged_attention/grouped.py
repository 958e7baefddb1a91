"""Images of equal lengths attend together, by one fused attention for each group."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def grouped(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: list[int],
    key_lengths: list[int],
    *,
    scale: float,
    dropout: float,
) -> Float[Tensor, "Tq H d"]:
    """The reference through `scaled_dot_product_attention`, which keeps no scores; without padding, so without a mask.

    Lengths that all differ make as many calls as there are images. On a CPU that costs nothing worth saving: one image
    occupies all cores.
    """
    queries, keys, values = query.split(query_lengths), key.split(key_lengths), value.split(key_lengths)
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for image, lengths in enumerate(zip(query_lengths, key_lengths, strict=True)):
        groups[lengths].append(image)
    attended = list(queries)
    for (num_queries, _), images in groups.items():
        if num_queries == 0:
            continue
        group = (_together(tokens, images) for tokens in (queries, keys, values))
        read = scaled_dot_product_attention(*group, scale=scale, dropout_p=dropout).transpose(1, 2)
        for image, tokens in zip(images, read, strict=True):
            attended[image] = tokens
    return torch.cat(attended)


def _together(tokens: Sequence[Tensor], images: list[int]) -> Tensor:
    """`[images, H, n, d]`; a single image is not copied."""
    chosen = [tokens[image] for image in images]
    return (chosen[0][None] if len(chosen) == 1 else torch.stack(chosen)).transpose(1, 2)
