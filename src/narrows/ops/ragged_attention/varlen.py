"""All images in one kernel for sequences of variable length: CUDA, half precision."""

from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import ImplementationUnavailable


def why_not() -> str | None:
    """Why this machine cannot run it, or None where it can."""
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def suits(query: Tensor, dropout: float) -> bool:
    """Whether the kernel takes these arguments."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and query.shape[-1] % 8 == 0 and dropout == 0.0


def varlen(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_lengths: list[int],
    key_lengths: list[int],
    *,
    scale: float,
    dropout: float,
) -> Float[Tensor, "Tq H d"]:
    """The reference through `torch.nn.attention.varlen.varlen_attn`."""
    if not suits(query, dropout):
        raise ImplementationUnavailable(
            "ragged_attention: impl='varlen' takes bfloat16 or float16 on a CUDA device, heads of a width divisible by "
            f"8 and no dropout; got {query.dtype} on {query.device.type}, width {query.shape[-1]}, dropout {dropout}. "
            "Use impl='grouped'."
        )
    from torch.nn.attention.varlen import varlen_attn

    query_starts, key_starts = (_starts(lengths, query.device) for lengths in (query_lengths, key_lengths))
    attended = varlen_attn(
        query, key, value, query_starts, key_starts, max(query_lengths), max(key_lengths), scale=scale
    )
    assert isinstance(attended, Tensor)
    return attended


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    """`[B + 1]`: where each image begins, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
