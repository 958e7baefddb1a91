"""Fused attention: the kernels of PyTorch, and what each of them cannot do."""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from narrows.precision import is_transformed


def attention(
    query: Float[Tensor, "*batch Q d"],
    key: Float[Tensor, "*batch N d"],
    value: Float[Tensor, "*batch N e"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "*batch Q e"]:
    r"""$\mathrm{softmax}(s\, q k^\top)\, v$ by `torch.nn.functional.scaled_dot_product_attention`.

    PyTorch chooses the kernel. Its fused kernels have no forward derivative, no second derivative and no batching rule:
    inside a transformation of `torch.func`, and for dual tensors, the form in plain operations takes their place.

    Args:
        query: `[..., Q, d]`.
        key: `[..., N, d]`.
        value: `[..., N, e]`.
        mask: broadcasts to `[..., Q, N]`, True where a query may read a key. Every row must have one.
        dropout: probability at which weights are dropped; 0 in evaluation.
        scale: s; `d ** -0.5` if None.
    """
    if is_transformed(query, key, value):
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


def varlen_attention(
    query: Float[Tensor, "Tq H d"],
    key: Float[Tensor, "Tk H d"],
    value: Float[Tensor, "Tk H d"],
    query_starts: Int32[Tensor, " starts"],
    key_starts: Int32[Tensor, " starts"],
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "Tq H d"]:
    """Attention of sequences that lie one after another, each within itself, in one kernel of PyTorch.

    Only where `why_not_varlen` says nothing. Query rows that belong to no sequence, and those of one without keys, read
    whatever the kernel of the day leaves there: give every row a key.

    Args:
        query: `[Tq, H, d]`, the rows of all S sequences.
        key: `[Tk, H, d]`.
        value: `[Tk, H, d]`.
        query_starts: `[S + 1]`, where each sequence begins, and Tq.
        key_starts: `[S + 1]`, likewise, and Tk.
        max_queries: no sequence has more queries than this.
        max_keys: no sequence has more keys than this.
        scale: as `attention`.
    """
    from torch.nn.attention.varlen import varlen_attn  # It imports all that torch compiles with.

    query, key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value))
    # Of the kernels behind `varlen_attn`, this one runs on every device and for every length that it is given here.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        read = varlen_attn(query, key, value, query_starts, key_starts, max_queries, max_keys, scale=scale)
    assert isinstance(read, Tensor)
    return read


def why_not_varlen(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why `varlen_attention` cannot take these rows `[..., d]`, or None where it can."""
    if query.device.type != "cuda":
        return f"it needs a CUDA device, got {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"it needs heads of a width divisible by 8, at most 256, got {query.shape[-1]}"
    if torch.cuda.is_available() and torch.cuda.get_device_properties(query.device).major < 8:
        return f"{torch.cuda.get_device_name(query.device)} is older than the kernel, which needs compute capability 8"
    return "it cannot be transformed by torch.func" if is_transformed(query, key, value) else None
