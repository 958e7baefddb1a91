"""Vision transformers of other libraries, recognised by class and split into the steps of their blocks."""

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from types import MappingProxyType

from torch import nn

from narrows.adapters.token_reduction import plugins
from narrows.adapters.token_reduction.hosts import towers
from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel, QueryKeyValue
from narrows.errors import InvalidArgument, InvalidType

__all__ = ["BlockCall", "HostBlock", "HostModel", "QueryKeyValue", "recognise"]

# Packages and the module that recognises their models, imported when a model derives from a class of that package: a
# function `recognise(module) -> HostModel | None`.
_HOSTS: Mapping[str, str] = MappingProxyType(
    {package: f"{__name__}.{package}" for package in ("timm", "transformers", "narrows")}
)
# Such functions that other packages bring, by the package whose models they recognise; they are asked first.
_BROUGHT = plugins.WithPlugins({}, plugins.HOSTS)


def recognise(model: nn.Module) -> HostModel:
    """The vision transformer in `model`, which may wrap it.

    Raises:
        InvalidType: there is none of a supported class.
        InvalidArgument: there are several.
    """
    found: list[HostModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        host = None if module in inside else _recognised(module)
        if host is not None:
            found.append(host)
            inside.update(module.modules())
    if not found:
        why = _reason(model)
        refused = "" if why is None else f" ({why})"
        raise InvalidType(
            "model",
            expected="a vision transformer all of whose blocks see all tokens, or a module that holds one: of timm "
            "(VisionTransformer, Eva, Beit, NaFlexVit), transformers (ViT, DeiT, BEiT, DINOv2, DINOv3, MAE, CLIP, "
            "SigLIP and the like), open_clip, OpenAI's CLIP, torchvision (vit_*), the hub (DINOv2 and DINOv3), narrows",
            got=f"{type(model).__module__}.{type(model).__qualname__}{refused}",
            hint="To support another model, pass a `HostModel` of it (narrows.adapters.token_reduction.hosts)."
            if why is None
            else "Take a plain vision transformer.",
        )
    if len(found) > 1:
        raise InvalidArgument(
            "model",
            expected="a module with one vision transformer in it",
            got=f"{len(found)}: {', '.join(type(host.module).__name__ for host in found)}",
            hint="Reduce each by its own call.",
        )
    return found[0]


_WINDOWS = "its attention is in windows, which are cut out of the whole grid"
_POOLED = "it pools tokens by their place in the grid between blocks"
_PYRAMID = "it works on feature maps, whose convolutions and strides need the whole grid"
_CONVOLUTIONS = "it is a convolutional network, which has no tokens"
_PACKED = "it puts the patches of all images into one row, where a budget would be shared by images"
# What cannot be reduced whatever its blocks are, by how the names of classes begin, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("Sam2VisionModel", "Sam2Hiera", "Hiera", "MultiScaleVit", "MViT", "PoolingVision"), _POOLED),
        **dict.fromkeys(("Sam3V", "SamVision", "SamHQVision", "VisionTransformerSAM", "ImageEncoderViT"), _WINDOWS),
        **dict.fromkeys(("Swin", "MaxVit", "MaxxVit", "VitDet", "Twins", "GlobalContextVit", "FocalNet"), _WINDOWS),
        **dict.fromkeys(("Segformer", "Pvt", "PyramidVisionTransformer", "Cvt", "DaVit", "EfficientVit"), _PYRAMID),
        **dict.fromkeys(
            ("MobileVit", "MobileViT", "EfficientFormer", "Levit", "LeViT", "CoaT", "PoolFormer"), _PYRAMID
        ),
        "PixtralVision": _PACKED,
        **dict.fromkeys(("ModifiedResNet", "ResNet", "ConvNeXt", "ConvNext", "EfficientNet", "RegNet"), _CONVOLUTIONS),
    }
)


def _reason(model: nn.Module) -> str | None:
    """Why no part of a model can be reduced, as far as that is known."""
    names = {kind.__name__: type(module) for module in model.modules() for kind in type(module).__mro__}
    for name, kind in names.items():
        for part, why in REFUSED.items():
            if name.startswith(part):
                return f"with a {kind.__name__}: {why}"
    for module in model.modules():
        if not type(module).__module__.startswith("transformers"):
            continue
        bounds = signature(module.forward).parameters.get("cu_seqlens")  # where the images in the row begin
        if bounds is not None and bounds.default is bounds.empty:
            return f"with a {type(module).__name__}: {_PACKED}"
    return None


def _recognised(module: nn.Module) -> HostModel | None:
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    for package in sorted(packages & _BROUGHT.keys()):
        host = _BROUGHT[package](module)
        if not (host is None or isinstance(host, HostModel)):
            expected = "a function that gives a HostModel or None"
            raise InvalidType(f"the host that is brought for {package!r}", expected=expected, got=repr(host))
        if host is not None:
            return host
    for package in packages & _HOSTS.keys():
        host = import_module(_HOSTS[package]).recognise(module)
        if host is not None:
            return host
    return towers.recognise(module)
