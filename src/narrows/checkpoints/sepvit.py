"""Checkpoints of SepViT with the parameter names of the paper's own release."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from narrows.checkpoints.files import Renamed, count_numbered, fill, read_weights, weights_in
from narrows.errors import InvalidArgument
from narrows.models.sepvit import SepViT
from narrows.validation import check_choice

# Their names and ours. They train on 224 pixels with patches 4 wide and heads 32 wide, which no state dict tells.
_NAMES = (
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.embedding."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.embedding_norm."),
    (r"^pos_block\.(\d+)\.proj\.0\.", r"stages.\1.position."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.norm1\.", ".attention.norm."),
    (r"\.win_tokens$", ".attention.window_token"),
    (r"\.attn\.DSA_qkv\.", ".attention.qkv."),
    (r"\.attn\.win_tokens_norm\.", ".attention.window_norm."),
    (r"\.attn\.PSA_qk\.", ".attention.window_query_key."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.norm2\.", ".feed_forward_norm."),
    (r"\.mlp\.fc1\.", ".feed_forward.0."),
    (r"\.mlp\.fc2\.", ".feed_forward.3."),
)
_IMAGE_SIZE, _PATCH_STRIDE, _HEAD_DIM = 224, 4, 32
_DENSE_WINDOWS = (7, (7, 14), (7, 14), 7)


def read_sepvit(state: str | Path | Mapping[str, Any], *, window_tokens: str = "per_window") -> SepViT:
    """The `SepViT` that has the weights of a checkpoint of the paper's release.

    Widths, depths, windows and classes are read from names and shapes. A classification checkpoint has a window token
    for each window at 224 pixels; a dense one has none (they are zero) and attention between windows in every block.
    Both run at any size.

    Args:
        state: their state dict, what holds it under "model" or "state_dict", or a file of either.
        window_tokens: "per_window" keeps every window token of a classification checkpoint, and its outputs at 224
            pixels; "shared" takes their mean, which does not depend on the size.

    Raises:
        InvalidArgument: names that are not theirs or are missing, shapes that do not fit.
    """
    check_choice("window_tokens", window_tokens, ("per_window", "shared"))
    given = weights_in(state, argument="state") if isinstance(state, Mapping) else read_weights(state)
    weights = Renamed(given, _NAMES, argument="state")
    widths: list[int] = []
    while (embedding := weights.get(f"stages.{len(widths)}.embedding.weight")) is not None and embedding.ndim == 4:
        widths.append(len(embedding))
    depths = [
        count_numbered(weights, rf"^stages\.{index}\.blocks\.(\d+)\.", argument="state") for index in range(len(widths))
    ]
    if not widths or 0 in depths:
        raise InvalidArgument(
            "state",
            expected="weights named 'patch_embeds.0.proj.weight', 'blocks.0.0.norm1.weight' and so on",
            got=f"{len(weights)} tensors, the first of them {next(iter(given))!r}",
            hint="Is it a checkpoint of SepViT?",
        )
    classifies = any(name.endswith("window_token") for name in weights)
    head = weights.get("head.weight")
    model = SepViT(
        image_size=_IMAGE_SIZE if classifies else None,
        num_classes=0 if head is None else len(head),
        channels=weights["stages.0.embedding.weight"].shape[1],
        dims=widths,
        depths=depths,
        heads=[max(1, width // _HEAD_DIM) for width in widths],
        window_size=_windows(weights, depths) if classifies else _DENSE_WINDOWS[: len(widths)],
        patch_stride=_PATCH_STRIDE,
        window_tokens=window_tokens if classifies else "shared",
        device=weights["stages.0.embedding.weight"].device,
        dtype=weights["stages.0.embedding.weight"].dtype,
    )
    expected = model.state_dict()
    for name, value in expected.items():
        if name.endswith("window_token"):
            token = weights.get(name)
            weights[name] = value if token is None else _token(token, value)
        elif name in ("norm.weight", "norm.bias") and not classifies:
            weights.setdefault(name, value)  # the dense networks end with their feature maps
    fill(model, weights)
    return model


def _windows(weights: Mapping[str, Tensor], depths: list[int]) -> list[list[int]]:
    """The window size of every block: its window tokens say how many windows cut the grid at 224 pixels."""
    sizes: list[list[int]] = []
    for stage, depth in enumerate(depths):
        grid = _IMAGE_SIZE // (_PATCH_STRIDE * 2**stage)
        sizes.append([])
        for block in range(depth):
            token = weights.get(f"stages.{stage}.blocks.{block}.attention.window_token")
            side = 1 if token is None or token.ndim < 2 else isqrt(token.shape[1])
            if token is not None and (token.ndim != 4 or side**2 != token.shape[1] or grid % side):
                raise InvalidArgument(
                    f"blocks.{stage}.{block}.win_tokens",
                    expected=f"tokens of square windows on a grid of {grid} x {grid}: [1, windows, 1, width]",
                    got=f"shape {tuple(token.shape)}",
                )
            sizes[-1].append(grid // side)
    return sizes


def _token(theirs: Tensor, ours: Tensor) -> Tensor:
    """`[1, K, 1, D]` in raster order as `[rows, columns, D]`, or their mean; as it is where D is another."""
    if theirs.shape[-1] != ours.shape[-1]:
        return theirs
    return theirs.view(ours.shape) if theirs.numel() == ours.numel() else theirs.mean((0, 1, 2)).view(ours.shape)
