"""The Perceiver resampler, for images and for clips."""

import torch
from torch import Tensor, nn

from narrows.layers.perceiver_resampler import PerceiverResampler
from tests.cases import LayerCase

# "auto" folds norms where nothing speaks against it; "folded" refuses norms that differ in their eps.
IMPLS = ("reference", "fused", "auto")


def build(**kwargs: object) -> nn.Module:
    return PerceiverResampler(
        16, depth=2, num_latents=3, heads=2, head_dim=8, mlp_ratio=2, num_time_embeddings=4, **kwargs
    )


def fill(resampler: nn.Module) -> None:
    # LayerNorm's scale and shift away from 1 and 0, embeddings as large as tokens: nothing cancels.
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in resampler.parameters() if p.ndim == 1):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for parameter in (resampler.latents, resampler.time_embeddings):
        parameter.data = torch.randn(parameter.shape, generator=generator)


def image(batch: int) -> dict[str, Tensor]:
    return {"media": torch.randn(batch, 7, 16)}


def clips(batch: int) -> dict[str, Tensor]:
    return {"media": torch.randn(batch, 2, 5, 3, 16)}


def squared_relu_over_media(**kwargs: object) -> nn.Module:
    return PerceiverResampler(
        16, depth=1, num_latents=3, heads=2, head_dim=4, activation="squared_relu", time_axis="media", **kwargs
    )


def media(batch: int) -> dict[str, Tensor]:
    return {"media": torch.randn(batch, 3, 4, 16)}


def outputs(result: object) -> dict[str, Tensor]:
    assert isinstance(result, Tensor)
    return {"latents": result}


CASES = [
    LayerCase("PerceiverResampler-image", build, image, outputs, padded={"mask": "media"}, impls=IMPLS, fill=fill),
    LayerCase(
        "PerceiverResampler-clips", build, clips, outputs, padded={"mask": "media"}, pad_axis=3, impls=IMPLS, fill=fill
    ),
    LayerCase(
        "PerceiverResampler-media-time",
        squared_relu_over_media,
        media,
        outputs,
        padded={"mask": "media"},
        pad_axis=2,
        impls=IMPLS,
        fill=lambda resampler: nn.init.normal_(resampler.latents),
    ),
]
