"""Parts of vision transformers: stems, position embedding, attention, feed-forward, block.

All of them take the `device` and `dtype` of their parameters as `**factory`.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import reset_submodules
from narrows.models.base import check_images
from narrows.ops.attention import attention
from narrows.validation import check_choice, check_positive


class PatchStem(nn.Sequential):
    """Patches to tokens: one strided convolution, `[B, C, H, W] -> [B, dim, H / patch, W / patch]`."""

    def __init__(self, channels: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__(nn.Conv2d(channels, dim, patch_size, patch_size, **factory))


class NormedPatchStem(nn.Module):
    """Patches to tokens through LayerNorm, Linear, LayerNorm: the same map as `PatchStem` between two norms."""

    def __init__(self, channels: int, dim: int, patch_size: int, **factory: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_norm = nn.LayerNorm(channels * patch_size**2, **factory)
        self.linear = nn.Linear(channels * patch_size**2, dim, **factory)
        self.token_norm = nn.LayerNorm(dim, **factory)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B dim h w"]:
        """Tokens on their grid."""
        patches = F.pixel_unshuffle(images, self.patch_size).movedim(1, -1)
        return self.token_norm(self.linear(self.patch_norm(patches))).movedim(-1, 1)


class ConvStem(nn.Sequential):
    """Patches to tokens through overlapping 3x3 convolutions of stride 2 (Xiao et al. 2021, arXiv 2106.14881).

    Small images on small data do not train without it. `patch_size` is a power of two.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, **factory: Any) -> None:
        steps = patch_size.bit_length() - 1
        if patch_size != 2**steps or steps < 1:
            raise InvalidArgument("patch_size", expected="a power of two for the convolutional stem", got=patch_size)
        widths = [channels, *(max(8, dim // 2 ** (steps - 1 - step)) for step in range(steps))]
        layers: list[nn.Module] = []
        for incoming, outgoing in pairwise(widths):
            convolution = nn.Conv2d(incoming, outgoing, 3, 2, 1, **factory)
            layers += [convolution, nn.GroupNorm(1, outgoing, **factory), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(dim, dim, 1, **factory))


STEMS: dict[str, type[PatchStem] | type[NormedPatchStem] | type[ConvStem]] = {
    "patch": PatchStem,
    "normed_patch": NormedPatchStem,
    "conv": ConvStem,
}


class TokenEmbedding(nn.Module):
    """Images `[B, C, H, W]` to tokens `[B, prefix + height * width, dim]` with learned positions.

    Images of another size than `image_size` get interpolated positions; their sides must be multiples of `patch_size`.

    Args:
        dim: token width.
        image_size: side of the square images the positions are learned on.
        patch_size: side of a patch.
        channels: channels of the images.
        stem: "patch" (one strided convolution), "normed_patch" (between two norms) or "conv" (overlapping 3x3
            convolutions).
        class_token: put a learned token before the grid.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        stem: str = "patch",
        class_token: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, image_size=image_size, patch_size=patch_size, channels=channels)
        check_choice("stem", stem, tuple(STEMS))
        self.channels, self.patch_size = channels, patch_size
        self.side = self._grid(image_size, image_size)[0]
        self.stem = STEMS[stem](channels, dim, patch_size, **factory)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim, **factory)) if class_token else None
        self.positions = nn.Parameter(torch.empty(1, int(class_token) + self.side**2, dim, **factory))
        self._reset_learned_tokens()

    def reset_parameters(self) -> None:
        """Draw the stem, the class token and the positions anew."""
        reset_submodules(self)
        self._reset_learned_tokens()

    def _reset_learned_tokens(self) -> None:
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    @property
    def prefix(self) -> int:
        """Number of tokens before the grid: 1 with a class token, else 0."""
        return 0 if self.class_token is None else 1

    def grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """`(height, width)` of the token grid of these images."""
        return self._grid(images.shape[-2], images.shape[-1])

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N dim"]:
        """Tokens, the class token first where there is one."""
        check_images(images, self.channels)
        grid = self.grid(images)
        # Contiguous, because every norm after it would copy a transposed map.
        tokens = self.stem(images).flatten(2).transpose(1, 2).contiguous()
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), 1)
        return tokens + self._positions(grid)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size:
            raise InvalidArgument(
                "images", expected=f"sides that are multiples of patch_size = {self.patch_size}", got=(height, width)
            )
        return height // self.patch_size, width // self.patch_size

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == (self.side, self.side):
            return self.positions
        prefix, on_grid = self.positions.split((self.prefix, self.side**2), 1)
        square = on_grid.transpose(1, 2).unflatten(2, (self.side, self.side))
        resized = F.interpolate(square, grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat((prefix, resized.flatten(2).transpose(1, 2)), 1)


class SelfAttention(nn.Module):
    """Multi-head self-attention on `[B, N, dim]`, fused; `mask [B, N]` says which tokens are real."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads)
        if head_dim is None and dim % heads:
            raise InvalidArgument("heads", expected=f"a divisor of dim = {dim}", got=heads)
        inner = heads * (head_dim or dim // heads)
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **factory)
        self.out = nn.Linear(inner, dim, **factory)

    def forward(self, tokens: Float[Tensor, "B N D"], mask: Tensor | None = None) -> Float[Tensor, "B N D"]:
        """Attended tokens."""
        query, key, value = (t.transpose(1, 2) for t in self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(2))
        dropout = self.dropout if self.training else 0.0
        attended = attention(query, key, value, None if mask is None else mask[:, None, None, :], dropout=dropout)
        return F.dropout(self.out(attended.transpose(1, 2).flatten(2)), dropout)


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0, **factory: Any) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim, **factory),
            nn.Dropout(dropout),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both linear layers anew."""
        self.apply(initialise_linear)


class Block(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        dim: token width.
        attention, feed_forward: any modules on tokens; linear layers of the attention are drawn by `initialise_linear`.
        device, dtype: where and in what precision parameters are made.
    """

    def __init__(self, dim: int, attention: nn.Module, feed_forward: nn.Module, **factory: Any) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, **factory)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim, **factory)
        self.feed_forward = feed_forward
        self.attention.apply(initialise_linear)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_submodules(self)
        self.attention.apply(initialise_linear)

    def forward(self, tokens: Float[Tensor, "B *layout D"]) -> Float[Tensor, "B *layout D"]:
        """The tokens after attention and feed-forward."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


def initialise_linear(module: nn.Module) -> None:
    """Xavier uniform weights and zero biases for linear layers, as in the first vision transformer's own code.

    The usual truncated normal of 0.02 is far narrower than that at small widths: a model 64 wide waits on a plateau
    whose length depends on the seed before it begins to learn.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
