"""Models of timm."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from narrows.errors import InvalidArgument, MissingExtra, NarrowsError
from narrows.hub.loaded import Opened, load_weights, read_weights

try:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.imagenet_info import ImageNetInfo
    from timm.data.transforms_factory import create_transform
except ImportError as error:
    raise MissingExtra("timm", extra="timm", purpose="open a model of timm's") from error


def open_timm(name: str, checkpoint: str | Path | None = None, **arguments: Any) -> Opened:
    """A model of timm's, by what `timm.create_model` calls it ("vit_small_patch16_224", "local-dir:<folder>").

    Args:
        name: the model.
        checkpoint: weights in place of the pretrained ones; the number of classes is theirs.
        arguments: further ones for `timm.create_model`.

    Raises:
        InvalidArgument: no such model, a checkpoint that does not fit.
        NarrowsError: weights that cannot be downloaded.
    """
    model = pretrained(name, **arguments) if checkpoint is None else _with_weights(name, checkpoint, arguments)
    config: dict[str, Any] = resolve_model_data_config(model)
    return Opened(
        name=f"timm:{name}",
        module=model.eval(),
        size=config["input_size"][1:],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_classes=getattr(model, "num_classes", 0),
        classes=_class_names(model),
        prepare=create_transform(**config, is_training=False),  # pyright: ignore[reportArgumentType]
    )


def _check_name(name: str) -> None:
    plain = name.partition(".")[0]
    if ":" in name or timm.is_model(plain):
        return
    close: Sequence[str] = difflib.get_close_matches(plain, timm.list_models(), n=3)
    raise InvalidArgument(
        "model",
        expected="a model of timm's",
        got=repr(name),
        hint=f"Did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them.",
    )


def pretrained(name: str, **arguments: Any) -> nn.Module:
    """What `timm.create_model` makes with its pretrained weights, in words of its own where that fails.

    Raises:
        InvalidArgument: no such model.
        NarrowsError: weights that cannot be downloaded.
    """
    _check_name(name)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub, the network, the disk and timm fail in ways of their own
        raise NarrowsError(
            f"The pretrained weights of timm's {name} could not be had ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Give a file with --checkpoint; or download them where there is a network, "
            f"with timm.create_model({name!r}, pretrained=True) and bring the folder that HF_HOME names here."
        ) from error


def _with_weights(name: str, checkpoint: str | Path, arguments: dict[str, Any]) -> nn.Module:
    _check_name(name)
    weights = read_weights(checkpoint)
    model = timm.create_model(name, pretrained=False, **arguments)
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    bias = weights.get(f"{classifier}.bias")
    if bias is not None and "num_classes" not in arguments and len(bias) != getattr(model, "num_classes", None):
        model = timm.create_model(name, pretrained=False, num_classes=len(bias), **arguments)
    load_weights(model, weights, checkpoint)
    return model


def _class_names(model: nn.Module) -> tuple[str, ...]:
    """What the pretrained configuration says; the WordNet ids of ImageNet for a thousand classes."""
    named = getattr(model, "pretrained_cfg", {}).get("label_names")
    if named:
        return tuple(named)
    return tuple(ImageNetInfo().label_names()) if getattr(model, "num_classes", 0) == 1000 else ()
