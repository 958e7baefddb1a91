"""Perceiver resampler and masked cross attention against flamingo-pytorch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from narrows.bench.case import BenchCase, Contest
from narrows.checkpoints import from_upstream

DIM, TEXT, LATENTS = 1024, 2048, 64


def equal_segments(num_media: int) -> Tensor:
    """Media at equal distances."""
    return torch.arange(num_media) * TEXT // num_media


def ragged_segments(num_media: int) -> Tensor:
    """A medium at the start and the others at random: segments from one token to several times the mean."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(TEXT - 1)[: num_media - 1]))


SEGMENTS = {"equal": equal_segments, "ragged": ragged_segments, "previous": equal_segments}


def text_reads(
    num_media: int, segments: str, targets: Mapping[str, float] | None = None, *, rival: str = "MaskedCrossAttention"
) -> BenchCase:
    """Text of 2048 tokens and 64 latents for each medium; its last medium, or with "previous" all before it."""

    def prepare(device: torch.device) -> Contest:
        from flamingo_pytorch import flamingo_pytorch

        torch.manual_seed(0)
        module = getattr(flamingo_pytorch, rival)(dim=DIM, only_attend_immediate_media=segments != "previous")
        for name, parameter in module.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 0.5)
        text = torch.randn(1, TEXT, DIM, device=device)
        media = torch.randn(1, num_media, LATENTS, DIM, device=device)
        locations = torch.zeros(1, TEXT, dtype=torch.bool).index_fill(1, SEGMENTS[segments](num_media), True)
        locations = locations.to(device)
        module.to(device)
        return Contest(
            from_upstream(module), module, lambda module: module(text, media, media_locations=locations), (text, media)
        )

    name = "gated_block" if rival == "GatedCrossAttentionBlock" else "masked_cross_attention"
    return BenchCase(
        f"{name}/{TEXT}x{DIM}/{num_media}-media/{segments}", f"flamingo_pytorch.{rival}", prepare, targets or {}
    )


def resampler(num_media: int, num_tokens: int) -> BenchCase:
    """Six layers on several media."""

    def prepare(device: torch.device) -> Contest:
        from flamingo_pytorch import PerceiverResampler

        torch.manual_seed(0)
        rival = PerceiverResampler(dim=DIM, depth=6, num_media_embeds=num_media).to(device)
        media = torch.randn(1, num_media, num_tokens, DIM, device=device)
        return Contest(from_upstream(rival), rival, lambda module: module(media), (media,))

    name = f"perceiver_resampler/{num_media}x{num_tokens}x{DIM}"
    return BenchCase(name, "flamingo_pytorch.PerceiverResampler", prepare)


CASES = (
    text_reads(4, "equal"),
    text_reads(16, "equal"),
    text_reads(32, "equal", {"forward+backward": 3.0, "saved": 8.0}),
    text_reads(32, "ragged", {"forward+backward": 3.0, "saved": 8.0}),
    text_reads(32, "previous"),
    text_reads(32, "ragged", rival="GatedCrossAttentionBlock"),
    resampler(8, 256),
)
