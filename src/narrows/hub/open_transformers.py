"""Models of transformers."""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from narrows.errors import InvalidArgument, MissingExtra, NarrowsError
from narrows.hub.loaded import Opened, load_weights, read_weights

try:
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
except ImportError as error:
    raise MissingExtra("transformers", extra="transformers", purpose="open a model of transformers'") from error

# Models of two towers, of which the one that sees is opened.
_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}


def open_transformers(name: str, checkpoint: str | Path | None = None) -> Opened:
    """A model of transformers', by its name on the hub or by its folder: the classifier, or else what sees.

    Args:
        name: on the hub, or a folder.
        checkpoint: weights in place of those that belong to the name.

    Raises:
        InvalidArgument: a folder without a model, a model without logits and pooled features, a checkpoint that does
            not fit.
        NarrowsError: files that cannot be downloaded.
    """
    config, processor = _read(name, AutoConfig), _read(name, AutoImageProcessor)
    architecture = (config.architectures or [""])[0]
    kind: Any = AutoModelForImageClassification if architecture.endswith("ForImageClassification") else AutoModel
    kind = getattr(transformers, _TOWERS[config.model_type]) if config.model_type in _TOWERS else kind
    if checkpoint is None:
        model = _read(name, kind)
    else:
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config.vision_config)
        load_weights(model, read_weights(checkpoint), checkpoint)
    classifies = kind is AutoModelForImageClassification
    side = getattr(model.config, "image_size", None)
    if side is None:
        raise InvalidArgument("model", expected="a vision transformer of transformers'", got=type(model).__name__)
    return Opened(
        name=f"hf:{name}",
        module=model.eval(),
        size=(side, side) if isinstance(side, int) else tuple(side),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        num_classes=config.num_labels if classifies else 0,
        classes=tuple(config.id2label[index] for index in range(config.num_labels)) if classifies else (),
        prepare=partial(_prepare, processor),
    )


def _prepare(processor: Any, image: Image.Image) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _read(name: str, kind: Any) -> Any:
    local = Path(name).is_dir()
    try:
        return kind.from_pretrained(name, local_files_only=local)
    except Exception as error:  # the hub, the network, the disk and transformers fail in ways of their own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if local:
            expected = "a folder with config.json, preprocessor_config.json and weights"
            raise InvalidArgument("model", expected=expected, got=f"{name!r} ({reason})") from error
        raise NarrowsError(
            f"{name} could not be had from the hub ({reason}). If it is a folder, check the path; else download it "
            f"where there is a network (`hf download {name}`) and give the folder as hf:<folder>."
        ) from error
