"""What `narrows fit`, `validate`, `test` and `predict` train: a task on a model that is opened by its name."""

from typing import Any

from narrows.hub.models import open_model
from narrows.jobs.object_models import object_model
from narrows.models.segmenter import Segmenter
from narrows.training.classification import Classification
from narrows.training.objects import ObjectTask
from narrows.training.segmentation import Segmentation


def classification(
    model: str = "vit_mini",
    *,
    num_classes: int = 10,
    image_size: int = 32,
    channels: int = 1,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> Classification:
    """Image classification.

    Args:
        model: a registry name (`narrows info` lists them), whose weights are random; a folder with a saved model or
            "timm:<name>", which begin with the weights they have.
        num_classes: width of the logits.
        image_size: side of the square images.
        channels: channels of the images.
        model_args: further arguments of the model, over those of its registry name.
        options: those of `Classification`.
    """
    shape = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
    network = open_model(model, **{**shape, **(model_args or {})}).module.train()
    return Classification(network, num_classes=num_classes, **options)


def segmentation(
    model: str = "sepvit_lite",
    *,
    num_classes: int = 11,
    image_size: int = 64,
    channels: int = 1,
    dim: int = 64,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> Segmentation:
    """Semantic segmentation by a `Segmenter`.

    Args:
        model: the backbone, a registry name with feature maps.
        num_classes: width of the logits.
        image_size: side of the square images the backbone is built for.
        channels: channels of the images.
        dim: width of the segmenter's pyramid and head.
        model_args: further arguments of the backbone, over those of its registry name.
        options: those of `Segmentation`.
    """
    backbone_args = {"image_size": image_size, **(model_args or {})}
    segmenter = Segmenter(model, num_classes=num_classes, channels=channels, dim=dim, backbone_args=backbone_args)
    return Segmentation(segmenter, num_classes=num_classes, **options)


def objects(
    model: str = "slot_autoencoder",
    *,
    image_size: int = 32,
    channels: int = 3,
    backbone: str | None = None,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> ObjectTask:
    """Objects without labels by an `ObjectDiscovery`.

    Args:
        model: a name of `narrows.list_models(task="objects")`, whose weights are random.
        image_size: side of the square images the decoder is built for.
        channels: channels of the images.
        backbone: of models that rebuild features: "timm:<name>", "hf:<name>", a folder or a registry name.
        model_args: further arguments of the model, over those of its name.
        options: those of `ObjectTask`.
    """
    return ObjectTask(
        object_model(model, image_size=image_size, channels=channels, backbone=backbone, **(model_args or {})),
        **options,
    )
