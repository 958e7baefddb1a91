"""Vision models by name: timm's, transformers', narrows' own, or a folder."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from narrows.checkpoints.files import read_weights
from narrows.data.images import MEAN_AND_STD
from narrows.errors import InvalidArgument, MissingExtra, NarrowsError
from narrows.files import replacing_folder
from narrows.models import ImageClassifier, create_model, list_models, load_model

if TYPE_CHECKING:
    from PIL import Image

SPELLINGS = "timm:<name>, hf:<name or folder>, a folder written by save_pretrained, or a registry name of narrows"

# Models of transformers with an image and a text tower: the class of the image tower.
_IMAGE_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}


@dataclass(frozen=True)
class LoadedModel:
    """A vision model that was opened by its name, with what is needed to prepare images for it.

    Args:
        name: the name it was opened by.
        module: the model, in evaluation mode.
        size: `(height, width)` of the images it takes.
        mean: what pixels in [0, 1] are normalised with, by channel.
        std: likewise.
        num_classes: width of its logits; 0 for a model that gives features.
        classes: what they are called, in their order; empty where that is not known.
        prepare: turns a PIL image into the `[C, H, W]` that the model takes; None for a model of narrows, whose images
            `narrows.data` prepares.
    """

    name: str
    module: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    prepare: "Callable[[Image.Image], Tensor] | None" = None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.module.parameters()).device

    @property
    def channels(self) -> int:
        """Channels of the images it takes."""
        return len(self.mean)

    def outputs(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B width"]:
        """Logits or pooled features.

        Raises:
            InvalidArgument: the model gives neither.
        """
        answer = self.module(images)
        for found in (answer, getattr(answer, "logits", None), getattr(answer, "pooler_output", None)):
            if isinstance(found, Tensor):
                return found
        raise InvalidArgument(
            "model", expected="a model that gives logits or pooled features", got=type(answer).__name__
        )

    def tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The last features, what a head reads; a feature map as its tokens, one vector as a single token."""
        module: Any = self.module
        if not hasattr(module, "forward_features"):  # of transformers
            return module.base_model(images).last_hidden_state
        features = module.forward_features(images)
        if features.ndim == 2:
            return features[:, None]
        if features.ndim == 4:
            channels_first = not isinstance(module, ImageClassifier) and features.shape[1] == module.num_features
            features = features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        return features

    def picture(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalised images as pictures in [0, 1]."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def open_model(name: str | Path, checkpoint: str | Path | None = None, **arguments: Any) -> LoadedModel:
    """Open a vision model by its name.

    Args:
        name: "timm:<name>", "hf:<name or folder>" for transformers, a folder written by `save_pretrained`, `narrows
            fit` or `narrows compare`, or a registry name of narrows, whose weights are random without a checkpoint.
        checkpoint: a file with weights in place of those that belong to the name; then nothing is downloaded.
        arguments: of the model, as narrows spells them: `num_classes`, `image_size`, `channels`, and others of its own.
            A model of timm's with another `num_classes` begins with a new head; a saved model has to have been built
            with them; models of transformers take none.

    Raises:
        InvalidArgument: an unknown name, a file that does not exist or does not fit, arguments that cannot be had.
        NarrowsError: weights that have to be downloaded and cannot be.
        MissingExtra: without timm or transformers, where they are needed.
    """
    source, _, rest = str(name).partition(":")
    if source == "timm" and rest:
        return _open_timm(rest, checkpoint, arguments)
    if source == "hf" and rest:
        return _open_transformers(rest, checkpoint, arguments)
    return _open_ours(str(name), checkpoint, arguments)


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model as safetensors and config; `open_model` takes the folder, as "timm:local-dir:<folder>" if of timm.

    Raises:
        InvalidArgument: a model of neither narrows nor timm.
    """
    if isinstance(model, PyTorchModelHubMixin):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        with replacing_folder(folder) as unfinished:
            save_for_hf(model, str(unfinished))
    else:
        raise InvalidArgument("model", expected="a model of narrows or of timm", got=type(model).__name__)


def _open_ours(name: str, checkpoint: str | Path | None, arguments: Mapping[str, Any]) -> LoadedModel:
    if Path(name).is_dir():
        model = load_model(name)
        saved = cast(dict[str, Any], model._hub_mixin_config)
        if other := {key: value for key, value in arguments.items() if saved.get(key) != value}:
            got = f"one with { ({key: saved.get(key) for key in other}) } in {name!r}"
            raise InvalidArgument("model", expected=f"a saved model with {other}", got=got)
    elif name in list_models():
        model = create_model(name, **arguments).eval()
    else:
        _refuse(name)
    if checkpoint is not None:
        _load_weights(model, _read_weights(checkpoint), checkpoint)
    config = cast(dict[str, Any], model._hub_mixin_config)
    side, (mean, std) = config["image_size"], MEAN_AND_STD[config["channels"]]
    return LoadedModel(name, model, (side, side), mean, std, num_classes=config["num_classes"])


def _refuse(name: str) -> NoReturn:
    close = difflib.get_close_matches(name, list_models(), n=1)
    if name.startswith("timm/"):
        hint = f"A model of timm's is called timm:{name.removeprefix('timm/')}, with a colon."
    else:
        hint = f"Did you mean {close[0]!r}?" if close else f"A model of timm's is called timm:{name}, say."
    raise InvalidArgument("model", expected=SPELLINGS, got=repr(name), hint=hint)


def _open_timm(name: str, checkpoint: str | Path | None, arguments: Mapping[str, Any]) -> LoadedModel:
    """By what `timm.create_model` calls it: "vit_small_patch16_224", "local-dir:<folder>"."""
    try:
        import timm
        from timm.data.config import resolve_model_data_config
        from timm.data.imagenet_info import ImageNetInfo
        from timm.data.transforms_factory import create_transform

        import narrows.timm  # noqa: F401 (registers SepViT)
    except ImportError as error:
        raise MissingExtra("timm", extra="timm", purpose="open a model of timm's") from error
    plain = name.partition(".")[0]
    if ":" not in name and not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them."
        raise InvalidArgument("model", expected="a model of timm's", got=repr(name), hint=hint)
    spelling = {"image_size": "img_size", "channels": "in_chans"}
    options = {spelling.get(key, key): value for key, value in arguments.items()}
    if checkpoint is None:
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub, the network, the disk and timm fail in ways of their own
            raise NarrowsError(
                f"The pretrained weights of timm's {name} could not be downloaded ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}). Give a file with --checkpoint; or download them where there is a "
                f"network, with timm.create_model({name!r}, pretrained=True) and bring the folder that HF_HOME names "
                "here."
            ) from error
    else:
        model, weights = timm.create_model(name, pretrained=False, **options), _read_weights(checkpoint)
        head = weights.get(f"{getattr(model, 'pretrained_cfg', {}).get('classifier')}.bias")
        if head is not None and "num_classes" not in options and len(head) != getattr(model, "num_classes", None):
            model = timm.create_model(name, pretrained=False, num_classes=len(head), **options)
        _load_weights(model, weights, checkpoint)
    num_classes = getattr(model, "num_classes", 0)
    named = getattr(model, "pretrained_cfg", {}).get("label_names")
    wordnet = ImageNetInfo().label_names() if num_classes == 1000 else ()
    config: dict[str, Any] = resolve_model_data_config(model)
    return LoadedModel(
        name=f"timm:{name}",
        module=model.eval(),
        size=config["input_size"][1:],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_classes=num_classes,
        classes=tuple(named or wordnet),
        prepare=create_transform(**config, is_training=False),  # pyright: ignore[reportArgumentType]
    )


def _open_transformers(name: str, checkpoint: str | Path | None, arguments: Mapping[str, Any]) -> LoadedModel:
    """By its name on the hub or by its folder: the classifier, or else the image encoder."""
    try:
        import transformers
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
    except ImportError as error:
        raise MissingExtra("transformers", extra="transformers", purpose="open a model of transformers'") from error
    if arguments:
        expected = "a model of timm or of narrows: those of transformers are opened as they are"
        raise InvalidArgument("model", expected=expected, got=f"{f'hf:{name}'!r} with {dict(arguments)}")
    config, processor = _read(name, AutoConfig), _read(name, AutoImageProcessor)
    architecture = (config.architectures or [""])[0]
    kind: Any = AutoModelForImageClassification if architecture.endswith("ForImageClassification") else AutoModel
    kind = getattr(transformers, _IMAGE_TOWERS[config.model_type]) if config.model_type in _IMAGE_TOWERS else kind
    if checkpoint is None:
        model = _read(name, kind)
    else:
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config.vision_config)
        _load_weights(model, _read_weights(checkpoint), checkpoint)
    classifies = kind is AutoModelForImageClassification
    side = getattr(model.config, "image_size", None)
    if side is None:
        raise InvalidArgument("model", expected="a vision transformer of transformers'", got=type(model).__name__)
    return LoadedModel(
        name=f"hf:{name}",
        module=model.eval(),
        size=(side, side) if isinstance(side, int) else tuple(side),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        num_classes=config.num_labels if classifies else 0,
        classes=tuple(config.id2label[index] for index in range(config.num_labels)) if classifies else (),
        prepare=partial(_prepare, processor),
    )


def _prepare(processor: Any, image: "Image.Image") -> Tensor:
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
            f"{name} could not be downloaded from the hub ({reason}). If it is a folder, check the path; else download "
            f"it where there is a network (`hf download {name}`) and give the folder as hf:<folder>."
        ) from error


def _read_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The weights in a file, without the prefix that `DataParallel` puts before their names."""
    return {name.removeprefix("module."): value for name, value in read_weights(checkpoint).items()}


def _load_weights(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | Path) -> None:
    """All weights of the module, from a file that holds no others."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        complaint = " ".join(str(error).split())
        raise InvalidArgument(
            "checkpoint",
            expected=f"the weights of a {type(module).__name__} of this size",
            got=f"others in {str(checkpoint)!r} ({complaint[:300]})",
        ) from error


def accelerator_of(device: str) -> str:
    """The accelerator that "auto", "cpu" or "cuda" names here: "cpu" or "cuda".

    Raises:
        InvalidArgument: another device, or CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidArgument("device", expected="'auto', 'cpu' or 'cuda'", got=repr(device))
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device", expected="'cpu' or 'auto' on a machine without CUDA", got="'cuda'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
