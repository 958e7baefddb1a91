"""Perceiver resampler and masked cross attention against flamingo-pytorch."""

import torch
from torch import Tensor, nn

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MediaKeysValues

DIM, TEXT, LATENTS = 1024, 2048, 64


def equal_segments(num_media: int) -> Tensor:
    """Media at equal distances."""
    return torch.arange(num_media) * TEXT // num_media


def ragged_segments(num_media: int) -> Tensor:
    """A medium at the start and the others at random: segments from one token to several times the mean."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(TEXT - 1)[: num_media - 1]))


SEGMENTS = {"equal": equal_segments, "ragged": ragged_segments, "previous": equal_segments}


def text_reads(
    num_media: int,
    segments: str,
    *,
    batch: int = 1,
    dim: int = DIM,
    saved: float | None = None,
    rival: str = "MaskedCrossAttention",
    device: str | None = None,
) -> BenchCase:
    """Text of 2048 tokens and 64 latents for each medium; its last medium, or with "previous" all before it."""

    def prepare(device: torch.device) -> Contest:
        from flamingo_pytorch import flamingo_pytorch

        torch.manual_seed(0)
        module = getattr(flamingo_pytorch, rival)(dim=dim, only_attend_immediate_media=segments != "previous")
        for name, parameter in module.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 0.5)
        text = torch.randn(batch, TEXT, dim, device=device)
        media = torch.randn(batch, num_media, LATENTS, dim, device=device)
        locations = torch.zeros(batch, TEXT, dtype=torch.bool).index_fill(1, SEGMENTS[segments](num_media), True)
        locations = locations.to(device)
        module.to(device)
        return Contest(
            from_upstream(module), module, lambda module: module(text, media, media_locations=locations), (text, media)
        )

    name = "gated_block" if rival == "GatedCrossAttentionBlock" else "masked_cross_attention"
    return BenchCase(
        f"{name}/{'' if batch == 1 else f'{batch}x'}{TEXT}x{dim}/{num_media}-media/{segments}",
        f"flamingo_pytorch.{rival}",
        prepare,
        {**NEVER_SLOWER, "saved": saved} if saved else NEVER_SLOWER,
        device=device,
    )


def resampler(num_media: int, num_tokens: int, *, batch: int = 1, device: str | None = None) -> BenchCase:
    """Six layers on several media."""

    def prepare(device: torch.device) -> Contest:
        from flamingo_pytorch import PerceiverResampler

        torch.manual_seed(0)
        rival = PerceiverResampler(dim=DIM, depth=6, num_media_embeds=num_media).to(device)
        media = torch.randn(batch, num_media, num_tokens, DIM, device=device)
        return Contest(from_upstream(rival), rival, lambda module: module(media), (media,))

    name = f"perceiver_resampler/{'' if batch == 1 else f'{batch}x'}{num_media}x{num_tokens}x{DIM}"
    return BenchCase(name, "flamingo_pytorch.PerceiverResampler", prepare, NEVER_SLOWER, device=device)


class _Decoding(nn.Module):
    """A gated block that reads one token, with what it kept of the media in place of the media."""

    def __init__(self, block: GatedCrossAttentionBlock, media: Tensor, *, last_alone: bool) -> None:
        super().__init__()
        self.block = block
        with torch.no_grad():
            kept = block.keys_values(media[:, -1:] if last_alone else media)
        self.key, self.value = nn.Buffer(kept.key), nn.Buffer(kept.value)

    def forward(self, text: Tensor, media: Tensor) -> Tensor:
        """The token after the block; `media` is what upstream needs again at each of them."""
        return self.block(text, MediaKeysValues(self.key, self.value, None))


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
        return Contest(ours, rival, lambda module: module(text, media), (text,), tolerance, others=(media,))

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
    text_reads(32, "equal", batch=4, dim=2048, device="cuda"),
    text_reads(32, "ragged", batch=4, dim=2048, device="cuda"),
    resampler(4, 256, batch=16, device="cuda"),
)
