"""Where training starts, and where it leaves the model: new models, models of narrows' own that were saved, timm's."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from narrows.errors import InvalidArgument
from narrows.models import create_model, load_model


def starting_model(name: str, *, num_classes: int, image_size: int, channels: int, **arguments: Any) -> nn.Module:
    """A model to train.

    Args:
        name: a registry name, which begins with random weights; a folder with a saved model, or "timm:<name>", which
            begin with the weights they have. A head of timm's for another number of classes begins anew.
        num_classes: width of the logits.
        image_size: side of the images.
        channels: channels of the images.
        arguments: further ones of the model.

    Raises:
        InvalidArgument: no such model, or a saved one for other images or classes.
        NarrowsError: weights of timm's that cannot be downloaded.
    """
    sizes = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    if name.startswith("timm:"):
        from narrows.hub.open_timm import pretrained

        return pretrained(
            name.removeprefix("timm:"), num_classes=num_classes, img_size=image_size, in_chans=channels, **arguments
        )
    if not Path(name).is_dir():
        return create_model(name, **sizes, **arguments)
    model = load_model(name)
    config: dict[str, Any] = model._hub_mixin_config  # pyright: ignore[reportAssignmentType]
    saved = {size: config[size] for size in sizes}
    if saved != sizes:
        raise InvalidArgument("model", expected=f"a model for the data's {sizes}", got=f"one for {saved} in {name!r}")
    if arguments:
        raise InvalidArgument("model_args", expected="none for a saved model, which brings its own", got=arguments)
    return model.train()


def save_model(model: nn.Module, folder: Path) -> None:
    """Weights as safetensors and config: for `load_model`, or of a model of timm's for "timm:local-dir:<folder>".

    Raises:
        InvalidArgument: a model of neither.
    """
    if isinstance(model, PyTorchModelHubMixin):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        save_for_hf(model, str(folder))
    else:
        raise InvalidArgument("model", expected="one of narrows or of timm, to be saved", got=type(model).__name__)
