"""Live modules of the packages people use today, turned into narrows modules with the same weights.

One file per mechanism; each maps the class it understands, written `module.Class`, to a function that converts an
instance. Upstream packages are never imported here: a module that was handed in has imported its own.
"""

from collections.abc import Callable, Mapping

from torch import nn

from narrows.checkpoints.upstream import ats_vit, flamingo, open_flamingo, sepvit, slot_attention, soft_moe
from narrows.errors import InvalidType

CONVERTERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    **slot_attention.CONVERTERS,
    **soft_moe.CONVERTERS,
    **sepvit.CONVERTERS,
    **ats_vit.CONVERTERS,
    **flamingo.CONVERTERS,
    **open_flamingo.CONVERTERS,
}


def from_upstream(module: nn.Module) -> nn.Module:
    """The narrows module with the weights, outputs and gradients of a live upstream module.

    Understood are modules of the PyPI packages `slot-attention` (SlotAttention, MultiHeadSlotAttention,
    SlotAttentionExperimental), `soft-moe-pytorch` (SoftMoE, DynamicSlotsSoftMoE), `vit-pytorch` (`sep_vit.SepViT`,
    `ats_vit.ViT`), `flamingo-pytorch` (PerceiverResampler, MaskedCrossAttention, GatedCrossAttentionBlock), and the
    resampler and gated block of `open-flamingo` and `otter-ai`; `read_open_flamingo` reads their checkpoints.
    Weights are copied, so that training one leaves the other as it was; device, dtype and train/eval mode carry over.

    Raises:
        InvalidType: `module` is of no class above.
    """
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name not in CONVERTERS:
        raise InvalidType("module", expected=f"an instance of one of {sorted(CONVERTERS)}", got=name)
    reference = next(module.parameters())
    converted = CONVERTERS[name](module).to(device=reference.device, dtype=reference.dtype)
    return converted.train(module.training)
