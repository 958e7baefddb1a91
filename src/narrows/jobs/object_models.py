"""Object models by name, with the backbone whose features they rebuild; folders that hold one."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.data import IGNORED, picture
from narrows.errors import InvalidArgument
from narrows.hub.models import LoadedModel, open_model
from narrows.models import ObjectDiscovery, create_model, list_models, load_model
from narrows.models.object_discovery import PRESETS
from narrows.models.object_parts import BroadcastDecoder
from narrows.training.objects import find
from narrows.validation import check_choice
from narrows.visualize import found_objects
from narrows.weights import read_config


class Tokens(nn.Module):
    """The tokens of a vision model that was opened by its name, as a backbone."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.module = loaded.module
        self._loaded = [loaded]

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N E"]:
        """What a head would read."""
        return self._loaded[0].tokens(images)


def object_model(
    name: str, *, image_size: int, channels: int = 3, backbone: str | None = None, **arguments: Any
) -> ObjectDiscovery:
    """An object model of `narrows.list_models(task="objects")` that fits the images and the backbone.

    Raises:
        InvalidArgument: no such model, or a backbone missing where there has to be one.
    """
    names = list_models(task="objects")
    check_choice("model", name, tuple(names))
    parts = {part: {**PRESETS[name][part], **arguments.pop(part, {})} for part in ("encoder", "decoder")}
    if parts["encoder"]["kind"] != "features":
        if backbone is not None:
            raise InvalidArgument("backbone", expected=f"None: {name} rebuilds pixels", got=repr(backbone))
        parts["encoder"].setdefault("channels", channels)
        parts["decoder"].update(channels=channels, image_size=image_size)
        return create_model(name, **parts, **arguments)
    if backbone is None:
        raise InvalidArgument(
            "backbone",
            expected=f"a vision model, whose features {name} rebuilds",
            got=None,
            hint='"timm:vit_small_patch14_dinov2", say.',
        )
    tokens = Tokens(
        open_model(backbone, image_size=image_size) if backbone.startswith("timm:") else open_model(backbone)
    )
    with torch.no_grad():
        features = tokens(torch.zeros(1, channels, image_size, image_size))
    side = int(features.shape[1] ** 0.5)
    if side < 2:
        raise InvalidArgument("backbone", expected="a model with tokens on a grid", got=f"{backbone}, which pools them")
    parts["encoder"].update(feature_dim=features.shape[2])
    parts["decoder"].update(feature_dim=features.shape[2])
    if parts["decoder"]["kind"] in ("mlp", "mixer"):
        parts["decoder"].update(grid=[side, side])
    return create_model(name, backbone=tokens, **parts, **arguments)


def open_object_model(folder: str | Path) -> ObjectDiscovery | None:
    """The object model in a folder; None where there is no folder, or one of another kind."""
    config = Path(folder) / "config.json"
    if not config.is_file() or read_config(config).get("architecture") != ObjectDiscovery.__name__:
        return None
    return load_model(folder)


@torch.no_grad()
def object_picture(model: ObjectDiscovery, images: Float[Tensor, "B *T C H W"], truth: Tensor | None = None) -> Any:
    """A figure of what a model finds in normalised images; of a clip, its frames."""
    place = next(model.parameters()).device
    generator, labels = torch.Generator(place).manual_seed(0), None if truth is None else truth.to(place)
    found = find(model, images.to(place), labels, generator, size=tuple(images.shape[-2:]))
    pixels = isinstance(model.decoder, BroadcastDecoder)
    first = (lambda each: each[0].cpu()) if images.ndim == 5 else (lambda each: each.cpu())  # frames of the first clip
    known = first(truth) if truth is not None and (truth != IGNORED).any() else None
    shown = picture(first(images)).expand(-1, 3, -1, -1)
    options: dict[str, Any] = {"truth": known, "clip": images.ndim == 5}
    if not pixels or found.parts is None:
        return found_objects(shown, first(found.attention), **options)
    rebuilt, parts = (picture(first(each)) for each in (found.reconstruction, found.parts))
    return found_objects(shown, first(found.masks), reconstruction=rebuilt, parts=parts, **options)
