"""Perceiver resampler and masked cross attention against flamingo-pytorch."""

import torch
from torch import Tensor, nn

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock

DIM, TEXT, LATENTS = 1024, 2048, 64


def equal_segments(num_media: int) -> Tensor:
    """Media at equal distances."""
    return torch.arange(num_media) * TEXT // num_media


def ragged_segments(num_media: int) -> Tensor:
    """A medium at the start and the others at random: segments from one token to several times the mean."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(TEXT - 1)[: num_media - 1]))


SEGMENTS = {"equal": equal_segments, "ragged": ragged_segments, "previous": equal_segments}


def text_reads(
    num_media: int, segments: str, *, saved: float | None = None, rival: str = "MaskedCrossAttention"
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
        f"{name}/{TEXT}x{DIM}/{num_media}-media/{segments}",
        f"flamingo_pytorch.{rival}",
        prepare,
        {**NEVER_SLOWER, "saved": saved} if saved else NEVER_SLOWER,
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
    return BenchCase(name, "flamingo_pytorch.PerceiverResampler", prepare, NEVER_SLOWER)


class _Decoding(nn.Module):
    """A gated block that reads one token, with what it kept of the media in place of the media."""

    def __init__(self, block: GatedCrossAttentionBlock, media: Tensor, *, last_alone: bool) -> None:
        super().__init__()
        with torch.no_grad():
            self.block, self.kept = block, block.keys_values(media[:, -1:] if last_alone else media)

    def forward(self, text: Tensor, media: Tensor) -> Tensor:
        """The token after the block; `media` is what upstream needs again at each of them."""
        return self.block(text, self.kept)


def decode_step(num_media: int, reads: str) -> BenchCase:
    """One token behind all its media: "last" reads the last of them, "all" every one."""

    def prepare(device: torch.device) -> Contest:
        from flamingo_pytorch import GatedCrossAttentionBlock as Upstream

        torch.manual_seed(0)
        rival = Upstream(dim=DIM, only_attend_immediate_media=reads == "last").to(device)
        nn.init.constant_(rival.attn_gate, 0.5)
        nn.init.constant_(rival.ff_gate, 0.5)
        text, media = torch.randn(1, 1, DIM, device=device), torch.randn(1, num_media, LATENTS, DIM, device=device)
        block = from_upstream(rival)
        assert isinstance(block, GatedCrossAttentionBlock)
        ours = _Decoding(block, media, last_alone=reads == "last").to(device)
        tolerance = None if reads == "last" else 1e-4
        return Contest(ours, rival, lambda module: module(text, media), (text,), tolerance)

    alone = "Upstream's token has no time of its own and reads all media at the same cost; ours reads the last one."
    return BenchCase(
        f"gated_block_decode/{num_media}-media/{reads}",
        "flamingo_pytorch.GatedCrossAttentionBlock",
        prepare,
        NEVER_SLOWER,
        alone if reads == "last" else "",
        quantities=("forward",),
    )


CASES = (
    text_reads(4, "equal"),
    text_reads(16, "equal"),
    text_reads(32, "equal", saved=8.0),
    text_reads(32, "ragged", saved=8.0),
    text_reads(32, "previous"),
    decode_step(32, "last"),
    decode_step(32, "all"),
    decode_step(4, "last"),
    text_reads(32, "ragged", rival="GatedCrossAttentionBlock"),
    resampler(8, 256),
)
