"""`vit_pytorch.sep_vit.SepViT`."""

from typing import Any

from torch import Tensor

from narrows.models import UpstreamSepViT


def sepvit(module: Any) -> UpstreamSepViT:
    """The `UpstreamSepViT` of an upstream `SepViT`, exact at every image size that upstream takes.

    Widths, windows and heads are those that upstream built, not those it was asked for: it ignores its arguments
    `window_size` and `dim_head`. Attention between windows is kept in the last stage too. Upstream leaves it without
    gradients as long as that stage is one window and uses it once images are larger.
    """
    stages = [Stage(*parts) for parts in module.layers]
    pool_norm, head = module.mlp_head[1:]
    converted = UpstreamSepViT(
        num_classes=head.out_features,
        channels=stages[0].embedding.in_channels,
        dims=[stage.embedding.out_channels for stage in stages],
        depths=[len(stage.blocks) for stage in stages],
        heads=[stage.attention.heads for stage in stages],
        window_size=[stage.attention.window_size for stage in stages],
        head_dim=[stage.attention.window_tokens_to_qk[0].normalized_shape[0] for stage in stages],
        patch_stride=stages[0].embedding.stride[0],
        mlp_ratio=[stage.hidden.out_channels / stage.hidden.in_channels for stage in stages],
        dropout=stages[0].attention.attend[1].p,
    )
    converted.load_state_dict(
        {
            "norm.weight": pool_norm.weight,
            "norm.bias": pool_norm.bias,
            "head.weight": head.weight,
            "head.bias": head.bias,
            **{f"stages.{i}.{name}": value for i, stage in enumerate(stages) for name, value in stage.state().items()},
        }
    )
    return converted


class Stage:
    """One stage of upstream: its parts by name, and their weights under the names of ours."""

    def __init__(self, patch_embedding: Any, position: Any, transformer: Any) -> None:
        self.embedding = patch_embedding.conv
        self.position = position.proj
        self.blocks = transformer.layers
        self.norm = transformer.norm
        self.attention = transformer.layers[0][0]
        self.hidden = transformer.layers[0][1].net[1]

    def state(self) -> dict[str, Tensor]:
        """State dict of the narrows stage."""
        return {
            "embedding.weight": self.embedding.weight,
            "embedding.bias": self.embedding.bias,
            "position.weight": self.position.weight,
            "position.bias": self.position.bias,
            **(_norm("norm", self.norm) if hasattr(self.norm, "g") else {}),
            **{
                f"blocks.{i}.{name}": value
                for i, (attention, feed_forward) in enumerate(self.blocks)
                for name, value in (_attention(attention) | _feed_forward(feed_forward)).items()
            },
        }


def _attention(attention: Any) -> dict[str, Tensor]:
    norm, _, _, query_key, _ = attention.window_tokens_to_qk
    out = attention.to_out[0]

    def query_then_key(rows: Tensor) -> Tensor:
        """From heads, (query, key), width of a head to (query, key), heads, width of a head."""
        return rows.unflatten(0, (attention.heads, 2, -1)).transpose(0, 1).flatten(0, 2)

    return {
        **_norm("attention_norm", attention.norm),
        "attention.window_token": attention.window_tokens,
        "attention.qkv.weight": attention.to_qkv.weight.squeeze(-1),
        "attention.window_norm.weight": norm.weight,
        "attention.window_norm.bias": norm.bias,
        "attention.window_query_key.weight": query_then_key(query_key.weight.squeeze(-1)),
        "attention.window_query_key.bias": query_then_key(query_key.bias),
        "attention.out.weight": out.weight.flatten(1),
        "attention.out.bias": out.bias,
    }


def _feed_forward(feed_forward: Any) -> dict[str, Tensor]:
    norm, hidden, _, _, out, _ = feed_forward.net
    return {
        **_norm("feed_forward_norm", norm),
        "feed_forward.0.weight": hidden.weight.flatten(1),
        "feed_forward.0.bias": hidden.bias,
        "feed_forward.3.weight": out.weight.flatten(1),
        "feed_forward.3.bias": out.bias,
    }


def _norm(name: str, norm: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.g.flatten(), f"{name}.bias": norm.b.flatten()}


CONVERTERS = {"vit_pytorch.sep_vit.SepViT": sepvit}
