"""Models by name."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from narrows.errors import InvalidArgument
from narrows.models import object_discovery, sepvit, upstream_sepvit, vit
from narrows.models.base import ImageClassifier
from narrows.models.features import FeaturePyramid
from narrows.validation import check_choice, checked
from narrows.weights import read_config

PRESETS: Mapping[type[ImageClassifier], Mapping[str, Mapping[str, Any]]] = {
    **vit.PRESETS,
    sepvit.SepViT: sepvit.PRESETS,
    upstream_sepvit.UpstreamSepViT: upstream_sepvit.PRESETS,
}

OBJECT_PRESETS = object_discovery.PRESETS
"""Models that find objects without labels: arguments of `ObjectDiscovery`."""

TIMM_SPELLING = {"in_chans": "channels", "img_size": "image_size"}


@checked
def list_models(pattern: str = "*", *, task: str = "classification") -> list[str]:
    """Names that `create_model` takes, those that match a shell-style pattern.

    Args:
        pattern: as of a shell.
        task: "classification", or "objects" for models that find objects without labels.

    >>> list_models("vit_*")
    ['vit_mini', 'vit_small']
    """
    check_choice("task", task, ("classification", "objects"))
    every = OBJECT_PRESETS if task == "objects" else (name for presets in PRESETS.values() for name in presets)
    return fnmatch.filter(sorted(every), pattern)


@overload
def create_model(  # pyright: ignore[reportOverlappingOverload]
    name: str, *, features_only: Literal[True], **kwargs: Any
) -> FeaturePyramid: ...


@overload
def create_model(  # pyright: ignore[reportOverlappingOverload]
    name: Literal["slot_autoencoder", "dinosaur", "spot", "savi", "slotcontrast", "videosaur"], **kwargs: Any
) -> object_discovery.ObjectDiscovery: ...


@overload
def create_model(name: str, **kwargs: Any) -> ImageClassifier: ...


@checked
def create_model(
    name: str, *, features_only: bool = False, out_indices: int | Sequence[int] | None = None, **kwargs: Any
) -> ImageClassifier | FeaturePyramid | object_discovery.ObjectDiscovery:
    """A model by its registry name; keyword arguments replace those of the preset.

    Args:
        name: one of `list_models()` or of `list_models(task="objects")`.
        features_only: the feature maps of its stages in place of logits, see `FeaturePyramid`.
        out_indices: of those stages.
        kwargs: arguments of the model, `device` and `dtype` among them; `in_chans` and `img_size`, as timm spells them,
            are `channels` and `image_size`.

    >>> model = create_model("vit_mini", num_classes=3)

    A large model is made without memory, sharded or moved, and then drawn as its constructor would:

    >>> model = create_model("vit_mini", device="meta")
    >>> model.to_empty(device="cpu").reset_parameters()

    Raises:
        InvalidArgument: no such name, no such argument of that model, or features of a model without stages.
    """
    if out_indices is not None and not features_only:
        raise InvalidArgument("out_indices", expected="None without features_only=True", got=out_indices)
    for theirs, ours in TIMM_SPELLING.items():
        if theirs in kwargs and ours in kwargs:
            raise InvalidArgument(theirs, expected=f"to be left out beside {ours}", got=kwargs[theirs])
    arguments = {TIMM_SPELLING.get(argument, argument): value for argument, value in kwargs.items()}
    for architecture, presets in PRESETS.items():
        if name in presets:
            model = _construct(architecture, name, {**presets[name], **arguments})
            return FeaturePyramid(model, out_indices) if features_only else model
    if name in OBJECT_PRESETS and not features_only:
        return _construct(object_discovery.ObjectDiscovery, name, {**OBJECT_PRESETS[name], **arguments})
    known = [*list_models(), *OBJECT_PRESETS]
    close = difflib.get_close_matches(name, known, n=1)
    raise InvalidArgument(
        "name",
        expected=f"one of {', '.join(known)}",
        got=repr(name),
        hint=f"Did you mean {close[0]!r}?" if close else "",
    )


def load_model(folder: str | Path) -> Any:
    """The model that `save_pretrained` wrote into `folder`, in evaluation mode.

    Raises:
        InvalidArgument: `folder` holds no model saved by narrows, or one that was damaged since.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise InvalidArgument(
            "folder", expected="a folder written by save_pretrained, with config.json", got=repr(str(folder))
        )
    architectures = {kind.__name__: kind for kind in (*PRESETS, object_discovery.ObjectDiscovery)}
    name = read_config(config_file).get("architecture")
    if name not in architectures:
        raise InvalidArgument("config.json", expected=f"'architecture' among {sorted(architectures)}", got=repr(name))
    return architectures[name].from_pretrained(folder)


def _construct(architecture: type[Any], name: str, arguments: Mapping[str, Any]) -> Any:
    known = architecture._hub_mixin_init_parameters
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise InvalidArgument(
            f"create_model({name!r}, ...)",
            expected=f"arguments among {', '.join(key for key in known if key != 'self')}",
            got=repr(unknown[0]),
            hint=f"Did you mean {close[0]!r}?" if close else "",
        )
    return architecture(**arguments)
