"""Towers of packages that cannot be installed, laid out as theirs: names, order of axes, what blocks are given.

OpenAI's CLIP (tokens are [N, B, D]), and DINOv2 and DINOv3 as `torch.hub` loads them (chunks of blocks, registers,
tokens and rotary positions in lists).
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualAttentionBlock(nn.Module):
    """Of OpenAI's CLIP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.attn_mask = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Of OpenAI's CLIP."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """Of OpenAI's CLIP."""

    def __init__(self, side: int = 32, patch: int = 8, width: int = 32, layers: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.input_resolution = side
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(torch.zeros(width, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj


class CLIP(nn.Module):
    """With a text tower, which is no vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = VisionTransformer(), Transformer(16, 2, 2)
        self.token_embedding = nn.Embedding(40, 16)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        words = self.transformer(self.token_embedding(text).permute(1, 0, 2)).permute(1, 0, 2)
        return self.visual(image) @ words[:, -1].T


class PatchEmbed(nn.Module):
    """Of the DINOs."""

    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = (side, side), (patch, patch)
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """Of the DINOs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MemEffAttention(nn.Module):
    """Of DINOv2; DINOv3's is called otherwise and rotates."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            query, key = self._rotated(query, rope), self._rotated(key, rope)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(attended))

    def _rotated(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        sine, cosine = rope
        prefix = heads.shape[-2] - sine.shape[-2]
        still, grid = heads[..., :prefix, :], heads[..., prefix:, :].to(sine.dtype)
        one, two = grid.chunk(2, -1)
        return torch.cat((still, (grid * cosine + torch.cat((-two, one), -1) * sine).to(heads.dtype)), -2)


class SelfAttention(MemEffAttention):
    """Of DINOv3."""


class NestedTensorBlock(nn.Module):
    """Of DINOv2."""

    attention: type[MemEffAttention] = MemEffAttention

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ls1, self.ls2 = self.attention(width, heads), LayerScale(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path1 = self.drop_path2 = nn.Identity()

    def one(self, x: Tensor, rope: Any = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x_or_x_list: Any) -> Tensor:
        return self.one(x_or_x_list)


class SelfAttentionBlock(NestedTensorBlock):
    """Of DINOv3, whose tokens and positions may come in lists."""

    attention = SelfAttention

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self.one(x_or_x_list, rope_or_rope_list)
        return [self.one(x, rope) for x, rope in zip(x_or_x_list, rope_or_rope_list, strict=True)]


class BlockChunk(nn.ModuleList):
    """Of DINOv2: blocks after as many that do nothing as came in the chunks before."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    """DINOv2, with registers; see `Dinov3`."""

    block: type[NestedTensorBlock] = NestedTensorBlock

    def __init__(self, side: int = 32, patch: int = 8, width: int = 32, heads: int = 2, depth: int = 4) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(side, patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens, self.num_register_tokens = nn.Parameter(torch.zeros(1, 2, width)), 2
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.blocks, self.norm, self.head = self._made(width, heads, depth), nn.LayerNorm(width), nn.Identity()

    def _made(self, width: int, heads: int, depth: int) -> nn.ModuleList:
        blocks = [self.block(width, heads) for _ in range(depth)]
        still: list[nn.Module] = [nn.Identity()] * 2
        return nn.ModuleList([BlockChunk(blocks[:2]), BlockChunk(still + blocks[2:])])

    def states(self, x: Tensor, lists: bool) -> list[Tensor]:
        """The tokens after each block."""
        height, width = (side // self.patch_embed.patch_size[0] for side in x.shape[-2:])
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)), 1)
        if x.shape[1] == self.pos_embed.shape[1]:
            x = x + self.pos_embed
        x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)
        return self.through(x, height, width, lists)

    def through(self, x: Tensor, height: int, width: int, lists: bool) -> list[Tensor]:
        states = []
        for chunk in self.blocks:
            for block in chunk:
                if not isinstance(block, nn.Identity):
                    x = block(x)
                    states.append(x)
        return states

    def forward_features(self, x: Tensor, masks: None = None) -> dict[str, Any]:
        x = self.states(x, True)[-1]
        normed, prefix = self.norm(x), 1 + self.num_register_tokens
        of_patches = normed[:, prefix:]
        return {"x_norm_clstoken": normed[:, 0], "x_norm_patchtokens": of_patches, "x_prenorm": x, "masks": masks}

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> tuple[Tensor, ...]:
        return tuple(self.norm(state)[:, 1 + self.num_register_tokens :] for state in self.states(x, False)[-n:])

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])


class Dinov3(DinoVisionTransformer):
    """DINOv3: rotary positions, made anew for each block in bfloat16."""

    block = SelfAttentionBlock

    def _made(self, width: int, heads: int, depth: int) -> nn.ModuleList:
        return nn.ModuleList([self.block(width, heads) for _ in range(depth)])

    def rope(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).flatten(0, 1)
        angles = (places[:, :, None] / torch.tensor([1.0, 3.0, 9.0, 27.0])).flatten(1).repeat(1, 2)
        return angles.sin().bfloat16(), angles.cos().bfloat16()

    def through(self, x: Any, height: int, width: int, lists: bool) -> list[Tensor]:
        states, x = [], [x] if lists else x
        for block in self.blocks:
            rope = self.rope(height, width)
            x = block(x, [rope] if lists else rope)
            states.append(x[0] if lists else x)
        return states


class _LinearClassifierWrapper(nn.Module):
    """The hub's linear classifier, of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.linear_head, self.layers = DinoVisionTransformer(), nn.Linear(64, 5), 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.forward_features(x)
        return self.linear_head(torch.cat((x["x_norm_clstoken"], x["x_norm_patchtokens"].mean(1)), 1))


# Classes of these packages read the class token alone; of copies that is not known.
VisionTransformer.forward.__module__ = "clip.model"
DinoVisionTransformer.forward.__module__ = "dinov2.models.vision_transformer"
