"""Modules of the PyPI package `slot-attention`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from narrows.checkpoints.upstream.conversion import Conversion, Rearranged, alias
from narrows.layers.slot_attention import SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention

_INITIAL_SLOTS = {
    "initial_slots.mean": Rearranged(("slots_mu",), torch.flatten),
    "initial_slots.log_scale": Rearranged(("slots_logsigma",), torch.flatten),
}
_ONE_WAY = {
    "": "",
    "norm_tokens": "norm_input",
    **{name: name for name in ("norm_slots", "to_q", "to_k", "to_v", "gru", "mlp")},
    "mlp.norm": "norm_pre_ff",
    "mlp.expand": "mlp.0",
    "mlp.contract": "mlp.2",
}


def slot_attention(module: Any) -> Conversion:
    """Upstream's `SlotAttention` has biases on queries, keys and values."""
    converted = SlotAttention(
        module.dim,
        num_slots=module.num_slots,
        num_iterations=module.iters,
        qkv_bias=True,
        mlp_dim=module.mlp[0].out_features,
        eps=module.eps,
    )
    return _conversion(converted, _ONE_WAY, scale=module.dim**-0.5)


def multi_head_slot_attention(module: Any) -> Conversion:
    """Upstream's `MultiHeadSlotAttention` has a softmax per head and a linear map after the heads."""
    inner = module.to_q.out_features
    heads = max(1, round(inner * module.scale**2))
    converted = SlotAttention(
        module.dim,
        num_slots=module.num_slots,
        num_iterations=module.iters,
        heads=heads,
        head_dim=inner // heads,
        qkv_bias=True,
        mlp_dim=module.mlp[0].out_features,
        eps=module.eps,
    )
    return _conversion(converted, {**_ONE_WAY, "to_out": "combine_heads"}, scale=(inner // heads) ** -0.5)


def _conversion(converted: SlotAttention, modules: Mapping[str, str], *, scale: float) -> Conversion:
    return Conversion(
        converted,
        SlotAttentionAsUpstream,
        modules,
        _INITIAL_SLOTS,
        without_module={"mlp.1": nn.ReLU},
        settings={"scale": scale},
    )


def slot_attention_experimental(module: Any) -> Conversion:
    """Upstream's `SlotAttentionExperimental` normalises what tokens read over the tokens."""
    dim = module.norm_inputs.normalized_shape[0]
    reads = {"slots_read": ("slots_to_inputs_attn", "slots_ff"), "tokens_read": ("inputs_to_slots_attn", "inputs_ff")}
    eps = module.slots_to_inputs_attn.fn.eps
    converted = TwoWaySlotAttention(
        dim,
        num_slots=module.num_slots,
        num_iterations=module.iters,
        qkv_bias=True,
        mlp_dim=module.slots_ff.fn.net[0].out_features,
        token_normalization="tokens",
        eps=eps,
    )
    modules: dict[str, str] = {"": "", "norm_tokens": "norm_inputs"}
    without_module: dict[str, type[nn.Module]] = {}
    settings: dict[str, float] = {}
    for ours, (attention, feed_forward) in reads.items():
        modules |= {
            ours: f"{attention}.fn",
            f"{ours}.norm_readers": f"{attention}.fn.norm_input",
            f"{ours}.norm_read": f"{attention}.fn.norm_context",
            **{f"{ours}.{name}": f"{attention}.fn.{name}" for name in ("to_q", "to_k", "to_v")},
            f"{ours}.gru": f"{attention}.gru",
            f"{ours}.mlp": f"{feed_forward}.fn",
            f"{ours}.mlp.norm": f"{feed_forward}.fn.norm",
            f"{ours}.mlp.expand": f"{feed_forward}.fn.net.0",
            f"{ours}.mlp.contract": f"{feed_forward}.fn.net.2",
            f"{ours}.mlp_gru": f"{feed_forward}.gru",
        }
        without_module[f"{feed_forward}.fn.net.1"] = nn.ReLU
        settings |= {f"{attention}.fn.eps": eps, f"{attention}.fn.scale": dim**-0.5}
    return Conversion(
        converted,
        TwoWaySlotAttentionAsUpstream,
        modules,
        _INITIAL_SLOTS,
        without_module=without_module,
        settings=settings,
    )


class SlotAttentionAsUpstream(SlotAttention):
    """`SlotAttention` that takes what upstream's takes and answers with the slots alone."""

    num_slots = alias("initial_slots.num_slots")
    iters = alias("num_iterations")

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:  # pyright: ignore
        """Slots `[B, K, D]`."""
        return super().forward(inputs, num_slots=num_slots).slots


class TwoWaySlotAttentionAsUpstream(TwoWaySlotAttention):
    """`TwoWaySlotAttention` that takes what upstream's takes and answers with slots and tokens."""

    num_slots = alias("initial_slots.num_slots")
    iters = alias("num_iterations")

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """Slots `[B, K, D]` and tokens `[B, N, D]`."""
        output = super().forward(inputs, num_slots=num_slots)
        return output.slots, output.tokens


CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {
    "slot_attention.slot_attention.SlotAttention": slot_attention,
    "slot_attention.multi_head_slot_attention.MultiHeadSlotAttention": multi_head_slot_attention,
    "slot_attention.slot_attention_experimental.SlotAttentionExperimental": slot_attention_experimental,
}
