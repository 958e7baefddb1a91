"""Time embeddings stretched to more frames than they were trained for."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from narrows.precision import at_least_float32


def time_embeddings(
    table: Float[Tensor, "L D"], num_frames: int, count: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch F D"]:
    r"""The embedding of each of F frames, of which the first `count` are real.

    Up to L frames take the rows of the table as they are; more share its length and take them by linear interpolation
    (Flamingo, appendix A.1: trained on 8 frames, run on 30). Frame f stands at

    $$t_f = f \cdot \min\!\left(1, \frac{L - 1}{\text{count} - 1}\right)$$

    so that the first and the last real frame stand at the ends of the table. What follows the last real frame stretches
    nothing: a padded clip is embedded as it is alone.
    """
    length = table.shape[0]
    frame = torch.arange(num_frames, device=table.device, dtype=at_least_float32(table).dtype)
    stretch = ((length - 1) / (count.to(frame.dtype) - 1).clamp(min=1)).clamp(max=1)
    position = (frame * stretch[..., None]).clamp(max=length - 1)
    before = position.long()
    after = (before + 1).clamp(max=length - 1)
    weight = (position - before).to(table.dtype)
    return torch.lerp(table[before], table[after], weight[..., None])
