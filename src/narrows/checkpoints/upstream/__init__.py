"""Live modules of the packages people use today, turned into narrows modules with the same weights.

One file per mechanism; each maps the class it understands, written `module.Class`, to a function that says what becomes
what. Upstream packages are never imported here: a module that was handed in has imported its own.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from narrows.checkpoints.upstream import ats_vit, flamingo, sepvit, slot_attention, soft_moe
from narrows.checkpoints.upstream.conversion import Conversion, carry_over, check_unchanged, class_name, joined
from narrows.errors import InvalidArgument, InvalidType

CONVERTERS: Mapping[str, Callable[[Any], Conversion]] = {
    **slot_attention.CONVERTERS,
    **soft_moe.CONVERTERS,
    **sepvit.CONVERTERS,
    **ats_vit.CONVERTERS,
    **flamingo.CONVERTERS,
}


def from_upstream(module: nn.Module) -> nn.Module:
    """The same module, or the same model, with narrows' layers in place of those of an upstream package.

    Understood are the PyPI packages `slot-attention` (SlotAttention, MultiHeadSlotAttention,
    SlotAttentionExperimental), `soft-moe-pytorch` (SoftMoE, DynamicSlotsSoftMoE), `vit-pytorch` (`sep_vit.SepViT`,
    `ats_vit.ViT`), `flamingo-pytorch` (PerceiverResampler, MaskedCrossAttention, GatedCrossAttentionBlock), and the
    same three of `open-flamingo` and `otter-ai`; `read_open_flamingo` reads their checkpoints.

    An upstream module becomes one of narrows, with narrows' arguments and results: `SlotAttention` answers with slots
    and their masks. A model that contains upstream modules, upstream's own wrappers among them, becomes a copy of it in
    which they are replaced. The model's code goes on calling them, so there each is called and answers as upstream's
    does; it is a subclass of the narrows class.

    What is given stays as it is, and shares no memory with the result. Each parameter keeps its dtype, its device (meta
    too) and `requires_grad`; each submodule its mode and its settings, as LayerNorm's eps; shared parts stay shared.
    Gradients and the state of an optimizer do not carry over: make a new optimizer over the parameters of the result.

    Args:
        module: an upstream module, or any model that contains some.

    Raises:
        InvalidType: no module, nothing of upstream inside, or a subclass of an upstream class.
        InvalidArgument: a part that was changed in a way a conversion would lose: hooks, LoRA, parametrizations,
            another class or shape. The message names it.

    >>> from slot_attention import SlotAttention
    >>> model = nn.Sequential(SlotAttention(num_slots=5, dim=64), nn.Linear(64, 10))
    >>> from_upstream(model)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 10])
    """
    if not isinstance(module, nn.Module):
        raise InvalidType("module", expected="an nn.Module", got=type(module).__name__)
    layers: dict[nn.Module, str] = {}
    others: set[nn.Module] = set()
    _find(module, "module", layers, others)
    if not layers:
        raise InvalidType(
            "module",
            expected="a module of an upstream package, or a model that contains some",
            got=f"a {class_name(module)}, without any inside",
            hint="help(narrows.from_upstream) lists the classes; each package's present version is meant.",
        )
    uses = Counter(id(parameter) for other in others for parameter in other.parameters(recurse=False))
    for layer in layers:
        uses.update(id(parameter) for _, parameter in layer.named_parameters(remove_duplicate=False))
    copied: dict[int, Any] = {}
    for layer, path in layers.items():
        conversion = _conversion(layer, path)
        converted = carry_over(layer, conversion, path=path, memo=copied, uses=uses)
        if layer is not module:
            converted.__class__ = conversion.as_upstream
        copied[id(layer)] = converted
    return copy.deepcopy(module, copied)


def _find(module: nn.Module, path: str, layers: dict[nn.Module, str], others: set[nn.Module]) -> None:
    """Sort what is in `module` into upstream modules, by their first path, and the modules around them."""
    if module in layers or module in others:
        return
    if class_name(module) in CONVERTERS:
        layers[module] = path
        return
    for kind in type(module).__mro__:
        if f"{kind.__module__}.{kind.__qualname__}" in CONVERTERS:
            raise InvalidType(
                path,
                expected=f"a {kind.__name__} of {kind.__module__} itself",
                got=f"a {class_name(module)}, a subclass, which may compute something else",
                hint=f"Where its output is that of a {kind.__name__}, load its state dict into one and convert that; "
                "otherwise derive it from the narrows class.",
            )
    others.add(module)
    for name, child in module.named_children():
        _find(child, joined(path, name), layers, others)


def _conversion(layer: nn.Module, path: str) -> Conversion:
    """What becomes what, with a narrows module that takes no memory yet."""
    check_unchanged(layer, path)
    try:
        with torch.device("meta"):
            return CONVERTERS[class_name(layer)](layer)
    except AttributeError as error:
        raise InvalidArgument(
            path,
            expected=f"the parts that a {class_name(layer)} has",
            got=f"others: {error}",
            hint="Was a part replaced? Otherwise upgrade the package.",
        ) from error
    except InvalidArgument as error:
        error.add_note(f"At {path}.")
        raise
