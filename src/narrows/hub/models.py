"""Any vision transformer by name or path."""

import difflib
from pathlib import Path
from typing import Any, cast

from narrows.data.images import MEAN_AND_STD
from narrows.errors import InvalidArgument
from narrows.hub.loaded import Opened, load_weights, read_weights
from narrows.models import create_model, list_models, load_model

KINDS = "timm:<name>, hf:<name or folder>, a folder written by save_pretrained, or a registry name of narrows"


def open_model(name: str, checkpoint: str | Path | None = None) -> Opened:
    """Open a vision transformer.

    Args:
        name: "timm:<name>", "hf:<name or folder>" for transformers, a folder written by `save_pretrained`, `narrows
            fit` or `narrows compare`, or a registry name of narrows, whose weights are random without a checkpoint.
        checkpoint: a file with weights in place of those that belong to the name; then nothing is downloaded.

    Raises:
        InvalidArgument: an unknown name, a file that does not exist or does not fit.
        NarrowsError: weights that have to be downloaded and cannot be.
        MissingExtra: without timm or transformers, where they are needed.
    """
    source, _, rest = name.partition(":")
    if source == "timm" and rest:
        from narrows.hub.open_timm import open_timm

        return open_timm(rest, checkpoint)
    if source == "hf" and rest:
        from narrows.hub.open_transformers import open_transformers

        return open_transformers(rest, checkpoint)
    return _open_ours(name, checkpoint)


def _open_ours(name: str, checkpoint: str | Path | None) -> Opened:
    if Path(name).is_dir():
        model = load_model(name)
    elif name in list_models():
        model = create_model(name).eval()
    else:
        close = difflib.get_close_matches(name, list_models(), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"A model of timm's is called timm:{name}, say."
        raise InvalidArgument("model", expected=KINDS, got=repr(name), hint=hint)
    if checkpoint is not None:
        load_weights(model, read_weights(checkpoint), checkpoint)
    config = cast(dict[str, Any], model._hub_mixin_config)
    side, (mean, std) = config["image_size"], MEAN_AND_STD[config["channels"]]
    return Opened(name, model, (side, side), mean, std, num_classes=config["num_classes"])
