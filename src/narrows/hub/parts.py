"""The frozen parts by name: language models with their tokenizers, and vision encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.data.images import MEAN_AND_STD
from narrows.errors import InvalidArgument, MissingExtra
from narrows.models import ImageClassifier, load_model

TIMM = "timm/"


class VisionEncoder(nn.Module):
    """Base class: pictures `[n, channels, image_size, image_size]` in 0..1 to tokens `[n, N, num_features]`.

    Args:
        name: what `open_vision_encoder` takes to open it again; empty where only its weights can tell.
        image_size: side of the pictures.
        channels: their channels.
        mean, std: the encoder's own normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, *, image_size: int, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.channels = name, image_size, channels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def num_features(self) -> int:
        """Width of the tokens."""
        with torch.no_grad():
            return self(self.mean.new_zeros(1, self.channels, self.image_size, self.image_size)).shape[-1]

    def features(self, images: Float[Tensor, "n C H W"]) -> Tensor:
        """Features of normalised images: tokens `[n, N, D]`, or one vector `[n, D]`."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n N D"]:
        """Tokens of pictures."""
        features = self.features((images - self.mean) / self.std)
        return features[:, None] if features.ndim == 2 else features


class ClassifierEncoder(VisionEncoder):
    """What the head of a narrows classifier reads.

    Args:
        classifier: the trained classifier.
    """

    def __init__(self, classifier: ImageClassifier) -> None:
        config = classifier._hub_mixin_config
        assert isinstance(config, dict)
        mean, std = MEAN_AND_STD[config["channels"]]
        super().__init__("", image_size=config["image_size"], channels=config["channels"], mean=mean, std=std)
        self.classifier = classifier

    def features(self, images: Float[Tensor, "n C H W"]) -> Tensor:
        """A map `[n, h, w, D]` is as good as its tokens."""
        features = self.classifier.forward_features(images)
        return features.flatten(1, 2) if features.ndim == 4 else features


class TimmEncoder(VisionEncoder):
    """The last features of a timm model, which brings its own image size and normalisation.

    Args:
        name: of timm.
        pretrained: download its weights.
    """

    def __init__(self, name: str, *, pretrained: bool = True) -> None:
        try:
            import timm
            from timm.data import resolve_model_data_config  # pyright: ignore[reportPrivateImportUsage]
        except ImportError as error:
            raise MissingExtra("timm", extra="timm", purpose="open a vision encoder of timm") from error
        try:
            model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except RuntimeError as error:
            raise InvalidArgument("vision_encoder", expected="a model of timm", got=repr(name)) from error
        config = resolve_model_data_config(model)
        channels, image_size, _ = config["input_size"]
        super().__init__(TIMM + name, image_size=image_size, channels=channels, mean=config["mean"], std=config["std"])
        self.model = model

    def features(self, images: Float[Tensor, "n C H W"]) -> Tensor:
        """A map `[n, D, h, w]` as its tokens."""
        features = self.model.forward_features(images)
        is_map = features.ndim == 4 and features.shape[1] == self.model.num_features
        return features.flatten(2).transpose(1, 2) if is_map else features.flatten(1, -2)


def open_vision_encoder(name: str | Path) -> VisionEncoder:
    """A frozen vision encoder in evaluation mode.

    Args:
        name: a folder with a narrows classifier, or `timm/<model>` for a pretrained model of timm.

    Raises:
        InvalidArgument: neither.
    """
    if str(name).startswith(TIMM):
        encoder: VisionEncoder = TimmEncoder(str(name).removeprefix(TIMM))
    elif Path(name).is_dir():
        encoder = ClassifierEncoder(load_model(name))
    else:
        raise InvalidArgument(
            "vision_encoder",
            expected=f"a folder with a narrows classifier, or {TIMM}<model>",
            got=f"{str(name)!r}, which is no folder",
        )
    return encoder.requires_grad_(False).eval()


def open_language_model(name: str | Path) -> tuple[nn.Module, Any]:
    """A causal language model of transformers and its tokenizer.

    Args:
        name: a folder that transformers wrote, or a name of the Hugging Face hub.

    Raises:
        InvalidArgument: transformers finds no causal language model there.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", extra="transformers", purpose="open a language model") from error
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(str(name))
            model: Any = AutoModelForCausalLM.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            "language_model",
            expected="a folder or a hub name of a causal language model with its tokenizer",
            got=f"{str(name)!r}: {str(error).splitlines()[0]}",
        ) from error
    return model.eval(), tokenizer


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for every small file."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
