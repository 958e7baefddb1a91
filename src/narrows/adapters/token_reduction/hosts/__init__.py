"""Vision transformers of other libraries, recognised by class and split into the steps of their blocks."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from torch import nn

from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel, QueryKeyValue
from narrows.errors import InvalidArgument, InvalidType

__all__ = ["BlockCall", "HostBlock", "HostModel", "QueryKeyValue", "recognise"]

# Packages and the module that recognises their models, imported when a model derives from a class of that package: a
# function `recognise(module) -> HostModel | None`.
_HOSTS: Mapping[str, str] = MappingProxyType(
    {package: f"{__name__}.{package}" for package in ("timm", "transformers", "narrows")}
)


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
        raise InvalidType(
            "model",
            expected="a vision transformer of timm (VisionTransformer and Eva families), of transformers (ViT, DeiT, "
            "DINOv2, DINOv3, CLIP, SigLIP) or of narrows, or a module that holds one",
            got=f"{type(model).__module__}.{type(model).__qualname__}",
            hint="To support another model, pass a `HostModel` of it (narrows.adapters.token_reduction.hosts).",
        )
    if len(found) > 1:
        raise InvalidArgument(
            "model",
            expected="a module with one vision transformer in it",
            got=f"{len(found)}: {', '.join(type(host.module).__name__ for host in found)}",
            hint="Reduce each by its own call.",
        )
    return found[0]


def _recognised(module: nn.Module) -> HostModel | None:
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    for package in packages & _HOSTS.keys():
        host = import_module(_HOSTS[package]).recognise(module)
        if host is not None:
            return host
    return None
