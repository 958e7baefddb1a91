"""What object discovery is built of: encoders from images to tokens, decoders from slots to images."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import draw_, reset_submodules
from narrows.models.base import check_images
from narrows.precision import at_least_float32
from narrows.validation import check_positive, check_tokens


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
    """

    reconstruction: Float[Tensor, "B C h w"]
    masks: Float[Tensor, "B K h w"]
    parts: Float[Tensor, "B K C h w"] | None


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

    def forward(
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: Bool[Tensor, "B K"] | None = None
    ) -> Decoded:
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


class MLPDecoder(nn.Module):
    """Each slot rebuilds the features of every cell with one MLP, from itself and the position of the cell (DINOSAUR).

    Args:
        slot_dim: S.
        feature_dim: E, width of the features.
        positions: N, cells at most; they have to be as many as tokens.
        hidden_dim: of the MLP.
        depth: linear maps of the MLP.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        slot_dim: int,
        *,
        feature_dim: int,
        positions: int,
        hidden_dim: int = 1024,
        depth: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim, feature_dim=feature_dim, positions=positions, hidden_dim=hidden_dim)
        if depth < 2:
            raise InvalidArgument("depth", expected="two linear maps at least", got=depth)
        self.positions = nn.Parameter(torch.empty(positions, slot_dim, device=device, dtype=dtype))
        widths = [slot_dim, *([hidden_dim] * (depth - 1)), feature_dim + 1]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, device=device, dtype=dtype) for before, after in pairwise(widths)
        )
        draw_(self.positions, lambda drawn: nn.init.normal_(drawn, std=0.02))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        draw_(self.positions, lambda drawn: nn.init.normal_(drawn, std=0.02))
        reset_submodules(self)

    def forward(
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: Bool[Tensor, "B K"] | None = None
    ) -> Decoded:
        """Every slot's own features and its share of each cell.

        Raises:
            InvalidArgument: other cells than there are positions.
        """
        height, width = target.shape[-2:]
        if height * width != len(self.positions):
            got = f"{height * width} tokens ({height} x {width})"
            raise InvalidArgument(
                "images", expected=f"{len(self.positions)} tokens, as the decoder has positions", got=got
            )
        x = slots[:, :, None] + self.positions
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        x = at_least_float32(self.layers[-1](x)).mT.unflatten(3, (height, width))
        return mixed(x[:, :, :-1], x[:, :, -1], slot_mask)


class TransformerDecoder(nn.Module):
    """Features of each cell from the slots and the cells before it, in causal order (SLATE, SPOT).

    In training an order is drawn for each batch: along rows or columns, from any corner (permutations of patches, SPOT
    section 3.2). In evaluation it goes along rows. Masks are the attention to the slots in the last block.

    Args:
        slot_dim: S.
        feature_dim: E, width of the features.
        positions: N, cells; they have to be as many as tokens.
        depth: blocks.
        heads: of attention.
        permute: draw orders; else always along rows (SLATE).
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        slot_dim: int,
        *,
        feature_dim: int,
        positions: int,
        depth: int = 4,
        heads: int = 4,
        permute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(slot_dim=slot_dim, feature_dim=feature_dim, positions=positions, depth=depth, heads=heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.permute = permute
        self.positions = nn.Parameter(torch.empty(positions, feature_dim, **factory))
        self.begin = nn.Parameter(torch.empty(8 if permute else 1, feature_dim, **factory))
        self.norm_slots = nn.LayerNorm(slot_dim, **factory)
        self.from_slots = nn.Linear(slot_dim, feature_dim, bias=False, **factory)
        self.blocks = nn.ModuleList(DecoderBlock(feature_dim, heads, **factory) for _ in range(depth))
        self.norm = nn.LayerNorm(feature_dim, **factory)
        self.head = nn.Linear(feature_dim, feature_dim, **factory)
        self._draw()

    def _draw(self) -> None:
        for parameter in (self.positions, self.begin):
            draw_(parameter, lambda drawn: nn.init.normal_(drawn, std=0.02))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self._draw()
        reset_submodules(self)

    def forward(
        self, slots: Float[Tensor, "B K S"], target: Tensor, slot_mask: Bool[Tensor, "B K"] | None = None
    ) -> Decoded:
        """Features of every cell from the slots and the true features of the cells before it."""
        height, width = target.shape[-2:]
        if height * width != len(self.positions):
            got = f"{height * width} tokens ({height} x {width})"
            raise InvalidArgument(
                "images", expected=f"{len(self.positions)} tokens, as the decoder has positions", got=got
            )
        number = int(torch.randint(8, ())) if self.permute and self.training else 0
        order = _order(height, width, number).to(target.device)
        features = target.flatten(2).mT.to(self.positions.dtype)[:, order]
        before = torch.cat((self.begin[number].expand(len(features), 1, -1), features[:, :-1]), 1)
        x = before + self.positions[order]
        memory = self.from_slots(self.norm_slots(slots))
        weights = x
        for block in self.blocks:
            x, weights = block(x, memory, slot_mask)
        back = order.argsort()
        found = at_least_float32(self.head(self.norm(x)))[:, back].mT.unflatten(2, (height, width))
        masks = at_least_float32(weights)[:, back].mT.unflatten(2, (height, width))
        return Decoded(found, masks, None)


class DecoderBlock(nn.Module):
    """Causal attention, attention to the slots, and an MLP, each after a LayerNorm and added."""

    def __init__(self, dim: int, heads: int, **factory: Any) -> None:
        super().__init__()
        if dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of feature_dim = {dim}", got=heads)
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **factory) for _ in range(3))
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, **factory), nn.Linear(dim, dim, **factory)
        self.to_q, self.to_kv = nn.Linear(dim, dim, **factory), nn.Linear(dim, 2 * dim, **factory)
        self.from_slots = nn.Linear(dim, dim, **factory)
        self.expand, self.contract = nn.Linear(dim, 4 * dim, **factory), nn.Linear(4 * dim, dim, **factory)

    def forward(
        self, x: Float[Tensor, "B N E"], memory: Float[Tensor, "B K E"], slot_mask: Bool[Tensor, "B K"] | None
    ) -> tuple[Float[Tensor, "B N E"], Float[Tensor, "B N K"]]:
        """The new features, and how each cell divides its attention among the slots (mean over heads)."""
        queries, keys, values = (self._split(part) for part in self.to_qkv(self.norms[0](x)).chunk(3, -1))
        read = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.to_out(read.transpose(1, 2).flatten(2))
        queries = self._split(self.to_q(self.norms[1](x)))
        keys, values = (self._split(part) for part in self.to_kv(memory).chunk(2, -1))
        logits = at_least_float32(queries @ keys.mT) * keys.shape[-1] ** -0.5
        if slot_mask is not None:
            logits = logits.masked_fill(~slot_mask[:, None, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num()
        x = x + self.from_slots((weights.to(values.dtype) @ values).transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norms[2](x)))), weights.mean(1)

    def _split(self, x: Float[Tensor, "B R E"]) -> Float[Tensor, "B H R _"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def mixed(
    parts: Float[Tensor, "B K C h w"], logits: Float[Tensor, "B K h w"], slot_mask: Bool[Tensor, "B K"] | None
) -> Decoded:
    """Every slot's part, weighted by a softmax over the slots and added."""
    if slot_mask is not None:
        logits = logits.masked_fill(~slot_mask[:, :, None, None], -torch.inf)
    masks = logits.softmax(1).nan_to_num()  # a scene without any slot
    return Decoded((parts * masks.unsqueeze(2)).sum(1), masks, parts)


def _order(height: int, width: int, number: int) -> Tensor:
    """The cells of a grid along rows (0 to 3) or columns (4 to 7), from each of the four corners."""
    cells = torch.arange(height * width).view(height, width)
    if number & 1:
        cells = cells.flip(0)
    if number & 2:
        cells = cells.flip(1)
    return (cells.T if number & 4 else cells).flatten()
