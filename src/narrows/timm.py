"""SepViT in timm's registry: after `import narrows.timm`, `timm.create_model("sepvit_tiny")` builds it.

The networks are built as timm builds its own: `pretrained_cfg`, `features_only`, `in_chans` and so on are there.

Raises:
    MissingExtra: without timm.
"""

from typing import Any

from torch import nn

from narrows.errors import MissingExtra
from narrows.models import create_model
from narrows.models.sepvit import PRESETS

try:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
except ImportError as error:
    raise MissingExtra("timm", extra="timm", purpose="register models in it") from error

# There are no published weights: no address in any of these.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stages.0.embedding",
            "classifier": "head",
            "paper_ids": "arXiv:2203.15380",
            "paper_name": "SepViT: Separable Vision Transformer",
        }
        for name in PRESETS
    }
)


def _entrypoint(name: str) -> Any:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(_construct, name, pretrained, feature_cfg=features, name=name, **kwargs)

    # timm registers a function under its own name, with the `default_cfgs` of its module.
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} of Li et al. 2022, arXiv 2203.15380."
    return build


def _construct(name: str, **kwargs: Any) -> nn.Module:
    model = create_model(name, **kwargs)
    model.in_chans = model.channels  # what timm calls it
    return model


for _name in PRESETS:
    if not is_model(_name):  # a name that timm has already stays timm's
        register_model(_entrypoint(_name))
