"""What object discovery is built of: encoders from images to tokens, decoders from slots to images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import reset_submodules
from narrows.layers.slot_decoders import AutoregressiveDecoder, DecodedFeatures, MLPDecoder, shares_of
from narrows.layers.slot_mixer import SlotMixer
from narrows.models.base import check_images
from narrows.precision import at_least_float32
from narrows.validation import check_positive, check_tokens

SlotMask = Bool[Tensor, "B K"] | Float[Tensor, "B K"] | None
"""True at real slots; or zeros and ones through which gradients pass."""


class Encoded(NamedTuple):
    """What an encoder makes of images.

    Args:
        tokens: `[B, N, D]`, what slots read.
        grid: `(height, width)` of the tokens.
        target: `[B, C, h, w]`, what a decoder has to rebuild.
    """

    tokens: Float[Tensor, "B N D"]
    grid: tuple[int, int]
    target: Float[Tensor, "B C h w"]


class Decoded(NamedTuple):
    """What a decoder makes of slots.

    Args:
        reconstruction: `[B, C, h, w]`.
        masks: `[B, K, h, w]`, the share of each slot in each cell; sums to 1 over the slots.
        parts: `[B, K, C, h, w]`, what each slot alone puts there; None of a decoder that has no such parts.
        transitions: `[B, N, N]`, logits of where each cell goes in a later frame; None of a decoder without them.
    """

    reconstruction: Float[Tensor, "B C h w"]
    masks: Float[Tensor, "B K h w"]
    parts: Float[Tensor, "B K C h w"] | None
    transitions: Float[Tensor, "B N N"] | None = None


class SoftPositions(nn.Module):
    """Adds to every cell of a grid a linear map of its distances to the four borders (Locatello et al., appendix E.2).

    Args:
        dim: D.
        scale: factor of what is added. At 1, slots of small scenes tend to divide the image by place.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        *,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Linear(4, dim, device=device, dtype=dtype)

    def forward(self, features: Float[Tensor, "B H W D"]) -> Float[Tensor, "B H W D"]:
        """`features` with their places added."""
        weight = self.project.weight
        lines = [torch.linspace(0, 1, side, device=weight.device, dtype=weight.dtype) for side in features.shape[1:3]]
        down, across = torch.meshgrid(*lines, indexing="ij")
        places = self.project(torch.stack((down, across, 1 - down, 1 - across), -1))
        return features + self.scale * places.to(features.dtype)


class TokenHead(nn.Module):
    """LayerNorm and a two-layer MLP on tokens, before slots read them.

    Args:
        dim: width of what comes in.
        out_dim: D, of what comes out.
        hidden_dim: of the MLP; `out_dim` if None.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(self, dim: int, out_dim: int, *, hidden_dim: int | None = None, **factory: Any) -> None:
        super().__init__()
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(dim, **factory)
        self.expand = nn.Linear(dim, hidden_dim, **factory)
        self.contract = nn.Linear(hidden_dim, out_dim, **factory)

    def forward(self, tokens: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch D"]:
        """Tokens for slots."""
        return self.contract(self.expand(self.norm(tokens)).relu())


class ConvEncoder(nn.Module):
    """Convolutions with ReLU, positions, LayerNorm and an MLP: the encoder of the slot attention paper.

    The target is the image itself. The paper's encoder has `kernels=(5, 5, 5, 5)`, `strides=(1, 1, 1, 1)`, `width=64`.

    Args:
        dim: D, width of the tokens.
        channels: of the images.
        width: channels of the convolutions.
        kernels, strides: of the convolutions, odd kernels.
        position_scale: factor of the positions.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 3,
        width: int = 32,
        kernels: tuple[int, ...] | list[int] = (5, 3, 3),
        strides: tuple[int, ...] | list[int] = (2, 1, 1),
        position_scale: float = 0.2,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, channels=channels, width=width)
        if len(kernels) != len(strides) or any(kernel % 2 == 0 for kernel in kernels):
            raise InvalidArgument("kernels", expected="odd numbers, as many as strides", got=(kernels, strides))
        self.dim, self.channels = dim, channels
        widths = [channels, *([width] * len(kernels))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, stride, kernel // 2, **factory)
            for before, after, kernel, stride in zip(widths[:-1], widths[1:], kernels, strides, strict=True)
        )
        self.positions = SoftPositions(width, scale=position_scale, **factory)
        self.head = TokenHead(width, dim, **factory)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_submodules(self)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Encoded:
        """Tokens of the images, which are the target."""
        check_images(images, self.channels)
        features = images.to(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            features = convolution(features).relu()
        features = self.positions(features.permute(0, 2, 3, 1))
        return Encoded(self.head(features).flatten(1, 2), (features.shape[1], features.shape[2]), images)


class FeatureEncoder(nn.Module):
    """Tokens of a pretrained backbone, which are the target too (DINOSAUR): LayerNorm and an MLP before the slots.

    A backbone that is not trained runs without gradients, and may be left out: cached tokens `[B, N, E]` are taken in
    place of images. Tokens before the grid (a class token, registers) are dropped.

    Args:
        dim: D, width of the tokens that slots read.
        feature_dim: E, width of the backbone's tokens.
        backbone: images `[B, C, H, W]` to tokens `[B, N, E]` or to a feature map `[B, E, h, w]`.
        trained: whether the backbone is trained, too. The target has no gradient in any case.
        hidden_dim: of the MLP; `2 * feature_dim` if None.
        device, dtype: where and in what precision parameters are made; the backbone stays as it is.
    """

    def __init__(
        self,
        dim: int,
        *,
        feature_dim: int,
        backbone: nn.Module | None = None,
        trained: bool = False,
        hidden_dim: int | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, feature_dim=feature_dim)
        self.dim, self.feature_dim, self.trained = dim, feature_dim, trained
        self.backbone = backbone if backbone is None or trained else backbone.requires_grad_(False)
        self.head = TokenHead(feature_dim, dim, hidden_dim=hidden_dim or 2 * feature_dim, **factory)

    def reset_parameters(self) -> None:
        """Draw the parameters of the head anew; the backbone stays."""
        reset_submodules(self.head)

    def train(self, mode: bool = True) -> "FeatureEncoder":
        """A backbone that is not trained stays in evaluation mode."""
        super().train(mode)
        if self.backbone is not None and not self.trained:
            self.backbone.eval()
        return self

    def forward(self, images: Float[Tensor, "B C H W"] | Float[Tensor, "B N E"]) -> Encoded:
        """Tokens of images, or of cached tokens.

        Raises:
            InvalidArgument: images without a backbone, or tokens that make no square grid.
        """
        if images.ndim == 3:
            check_tokens("tokens", images, dim=self.feature_dim, layout="[B, N, E]")
            features = images
        elif self.backbone is None:
            raise InvalidArgument(
                "images",
                expected=f"cached tokens [B, N, {self.feature_dim}]",
                got=tuple(images.shape),
                hint="Or give the encoder a backbone.",
            )
        else:
            with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                features: Tensor = self.backbone(images)
            features = features.flatten(2).mT if features.ndim == 4 else features
        side = int(features.shape[1] ** 0.5)
        features = features[:, features.shape[1] - side * side :]
        if features.shape[2] != self.feature_dim:
            expected = f"{features.shape[2]}, the width of the backbone's tokens"
            raise InvalidArgument("feature_dim", expected=expected, got=self.feature_dim)
        target = features.detach().mT.unflatten(2, (side, side))
        return Encoded(self.head(features.to(self.head.norm.weight.dtype)), (side, side), target)


class BroadcastDecoder(nn.Module):
    """Slots put into every cell of a small grid, with positions, and convolutions up to the size of the image.

    The spatial broadcast decoder of the paper, but that its last step answers for 2 x 2 pixels at once (sub-pixel
    convolution, Shi et al. 2016): a quarter of the cost.

    Args:
        slot_dim: S.
        image_size: side of the square images, `start` times a power of two, twice at least.
        channels: of the images.
        width: of the convolutions.
        start: side of the grid that slots are put into.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self, slot_dim: int, *, image_size: int, channels: int = 3, width: int = 48, start: int = 8, **factory: Any
    ) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim, image_size=image_size, channels=channels, width=width, start=start)
        doublings = (image_size // start).bit_length() - 1
        if doublings < 1 or start << doublings != image_size:
            expected = f"{start} times a power of two, {2 * start} at least"
            raise InvalidArgument("image_size", expected=expected, got=image_size)
        self.image_size, self.channels, self.start = image_size, channels, start
        self.positions = SoftPositions(slot_dim, **factory)
        widths = [slot_dim, *([width] * (doublings - 1))]
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, 2, 1, **factory) for before, after in pairwise(widths)
        )
        self.refine = nn.ModuleList(nn.Conv2d(before, width, 3, padding=1, **factory) for before in (widths[-1], width))
        self.head = nn.Conv2d(width, 4 * (channels + 1), 3, padding=1, **factory)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_submodules(self)

    def forward(self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: SlotMask = None) -> Decoded:
        """Every slot's own image and its share of each pixel; the shares are a softmax over slots."""
        batch, number, _ = slots.shape
        if target.shape[-2:] != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size} pixels, which the decoder is built for"
            raise InvalidArgument("images", expected=expected, got=tuple(target.shape))
        grid = slots.flatten(0, 1)[:, None, None].expand(-1, self.start, self.start, -1)
        x = self.positions(grid).permute(0, 3, 1, 2)
        for layer in (*self.enlarge, *self.refine):
            x = layer(x).relu()
        x = at_least_float32(F.pixel_shuffle(self.head(x), 2)).unflatten(0, (batch, number))
        return mixed(x[:, :, :-1], x[:, :, -1], slot_mask)


class MLPFeatures(MLPDecoder):
    """`MLPDecoder` on the grid of the features it has to rebuild.

    Args:
        transitions: whether it predicts, beside the features, where each cell goes in a later frame (VideoSAUR): a
            logit for each cell of its grid, which then has to be that of the features.
    """

    def __init__(
        self, slot_dim: int, feature_dim: int, *, grid: Sequence[int], transitions: bool = False, **options: Any
    ) -> None:
        super().__init__(slot_dim, feature_dim + _cells(grid) * transitions, grid=grid, **options)
        self.transitions = transitions

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: SlotMask = None
    ) -> Decoded:
        """The features of every cell, and each slot's share of it."""
        grid = _grid_of(target, self.grid if self.transitions else None)
        return _on_grid(super().forward(slots, slot_mask, grid=grid), target)


class MixedFeatures(SlotMixer):
    """`SlotMixer` on the grid of the features it has to rebuild; `transitions` as of `MLPFeatures`."""

    def __init__(
        self, slot_dim: int, feature_dim: int, *, grid: Sequence[int], transitions: bool = False, **options: Any
    ) -> None:
        super().__init__(slot_dim, feature_dim + _cells(grid) * transitions, grid=grid, **options)
        self.transitions = transitions

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: SlotMask = None
    ) -> Decoded:
        """The features of every cell, and how much of each slot it reads."""
        grid = _grid_of(target, self.grid if self.transitions else None)
        return _on_grid(super().forward(slots, slot_mask, grid=grid), target)


class PatchTransformer(AutoregressiveDecoder):
    """`AutoregressiveDecoder` of the features it has to rebuild, each from the true ones before it."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: SlotMask = None
    ) -> Decoded:
        """The features of every cell, and what each reads of the slots in the last block."""
        features = target.flatten(2).mT.to(self.first.dtype)
        grid = target.shape[-2], target.shape[-1]
        return _on_grid(super().forward(slots, features, slot_mask, grid=grid), target)


def cells_of(decoder: nn.Module) -> int | None:
    """Positions that a decoder was built with; None where they are those of what it is given."""
    if isinstance(decoder, BroadcastDecoder):
        return decoder.start**2
    return _cells(decoder.grid) if isinstance(decoder, MLPFeatures | MixedFeatures) else None


def _cells(grid: Sequence[int]) -> int:
    return grid[0] * grid[1] if len(grid) == 2 else 0


def _grid_of(target: Tensor, own: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of the features; `own`, if it is given, has to be the same."""
    grid = target.shape[-2], target.shape[-1]
    if own is not None and own != grid:
        expected = f"features on the {own[0]} x {own[1]} cells whose transitions the decoder predicts"
        raise InvalidArgument("images", expected=expected, got=f"{grid[0]} x {grid[1]}")
    return grid


def _on_grid(found: DecodedFeatures, target: Tensor) -> Decoded:
    """What was decoded on the grid of the features; what is decoded beyond their width are transitions."""
    grid, width = (target.shape[-2], target.shape[-1]), target.shape[1]
    features = at_least_float32(found.features)
    transitions = features[..., width:] if features.shape[-1] > width else None
    return Decoded(features[..., :width].mT.unflatten(2, grid), found.masks.unflatten(2, grid), None, transitions)


def mixed(parts: Float[Tensor, "B K C h w"], logits: Float[Tensor, "B K h w"], slot_mask: SlotMask) -> Decoded:
    """Every slot's part, weighted by a softmax over the slots and added."""
    masks = shares_of(logits, slot_mask)
    return Decoded((parts * masks.unsqueeze(2)).sum(1), masks, parts)
