"""Modules of the PyPI package `slot-attention`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from narrows.layers.slot_attention import SlotAttention
from narrows.layers.two_way_slot_attention import TwoWaySlotAttention

_INITIAL_SLOTS = {"slots_mu": "initial_slots.mean", "slots_logsigma": "initial_slots.log_scale"}
_ONE_WAY = {
    **_INITIAL_SLOTS,
    "norm_input.": "norm_tokens.",
    "norm_pre_ff.": "mlp.norm.",
    "mlp.0.": "mlp.expand.",
    "mlp.2.": "mlp.contract.",
    "combine_heads.": "to_out.",
}
_EXCHANGE = {
    "attn.fn.norm_input.": "norm_readers.",
    "attn.fn.norm_context.": "norm_read.",
    "attn.fn.": "",
    "attn.gru.": "gru.",
    "ff.fn.norm.": "mlp.norm.",
    "ff.fn.net.0.": "mlp.expand.",
    "ff.fn.net.2.": "mlp.contract.",
    "ff.gru.": "mlp_gru.",
}
_TWO_WAY = {
    **_INITIAL_SLOTS,
    "norm_inputs.": "norm_tokens.",
    **{f"slots_to_inputs_{theirs}": f"slots_read.{ours}" for theirs, ours in _EXCHANGE.items() if "attn" in theirs},
    **{f"slots_{theirs}": f"slots_read.{ours}" for theirs, ours in _EXCHANGE.items() if "ff" in theirs},
    **{f"inputs_to_slots_{theirs}": f"tokens_read.{ours}" for theirs, ours in _EXCHANGE.items() if "attn" in theirs},
    **{f"inputs_{theirs}": f"tokens_read.{ours}" for theirs, ours in _EXCHANGE.items() if "ff" in theirs},
}


def slot_attention(module: Any) -> SlotAttention:
    """`SlotAttention`: biases on queries, keys and values."""
    converted = SlotAttention(
        module.dim,
        num_slots=module.num_slots,
        num_iterations=module.iters,
        qkv_bias=True,
        mlp_dim=module.mlp[0].out_features,
        eps=module.eps,
    )
    return _load(converted, module, _ONE_WAY)


def multi_head_slot_attention(module: Any) -> SlotAttention:
    """`MultiHeadSlotAttention`: the softmax per head, a linear map after the heads."""
    head_dim = round(module.scale**-2)
    converted = SlotAttention(
        module.dim,
        num_slots=module.num_slots,
        num_iterations=module.iters,
        heads=module.to_q.out_features // head_dim,
        head_dim=head_dim,
        qkv_bias=True,
        mlp_dim=module.mlp[0].out_features,
        eps=module.eps,
    )
    return _load(converted, module, _ONE_WAY)


def slot_attention_experimental(module: Any) -> TwoWaySlotAttention:
    """`SlotAttentionExperimental`: what tokens read is normalised over the tokens."""
    converted = TwoWaySlotAttention(
        module.norm_inputs.normalized_shape[0],
        num_slots=module.num_slots,
        num_iterations=module.iters,
        qkv_bias=True,
        mlp_dim=module.slots_ff.fn.net[0].out_features,
        token_normalization="tokens",
        eps=module.slots_to_inputs_attn.fn.eps,
    )
    return _load(converted, module, _TWO_WAY)


def _load(converted: Any, module: nn.Module, prefixes: Mapping[str, str]) -> Any:
    """`converted` with the parameters of `module`, renamed by the first of `prefixes` that fits."""

    def renamed(name: str) -> str:
        return next(
            (ours + name.removeprefix(theirs) for theirs, ours in prefixes.items() if name.startswith(theirs)), name
        )

    own = converted.state_dict()
    theirs: dict[str, Tensor] = {renamed(name): value for name, value in module.state_dict().items()}
    converted.load_state_dict({name: value.reshape(own[name].shape) for name, value in theirs.items()})
    return converted


CONVERTERS: Mapping[str, Callable[[Any], nn.Module]] = MappingProxyType(
    {
        "slot_attention.slot_attention.SlotAttention": slot_attention,
        "slot_attention.multi_head_slot_attention.MultiHeadSlotAttention": multi_head_slot_attention,
        "slot_attention.slot_attention_experimental.SlotAttentionExperimental": slot_attention_experimental,
    }
)
