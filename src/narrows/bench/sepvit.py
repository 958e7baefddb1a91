"""SepViT: upstream's form against `vit_pytorch.sep_vit.SepViT`, the paper's against networks of about its cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream
from narrows.models import create_model

# Multiply-accumulates at 224 pixels, in thousand millions: sepvit_tiny 4.51, the others beside their names.
SWIN, TWINS, CONVNEXT, VIT = (
    "swin_tiny_patch4_window7_224",  # 4.49
    "twins_svt_small",  # 2.93: at the same speed for each of them, its time is 0.65 of ours
    "convnext_tiny",  # 4.46
    "vit_small_patch16_224",  # 4.60
)


def upstream(
    dim: int, depth: Sequence[int], heads: Sequence[int], size: int, batch: int, *, device: str | None = None
) -> BenchCase:
    """A whole network on images of `size` x `size` pixels."""

    def prepare(device: torch.device) -> Contest:
        from vit_pytorch.sep_vit import SepViT

        torch.manual_seed(0)
        rival = SepViT(num_classes=1000, dim=dim, depth=tuple(depth), heads=tuple(heads)).to(device).eval()
        images = torch.randn(batch, 3, size, size, device=device)
        return Contest(from_upstream(rival), rival, lambda module: module(images), (images,))

    widths = "-".join(str(dim * 2**stage) for stage in range(len(depth)))
    name = f"sepvit/{widths}/{size}px/batch{batch}"
    return BenchCase(name, "vit_pytorch.sep_vit.SepViT", prepare, NEVER_SLOWER, device=device)


def peer(
    rival: str,
    size: int = 224,
    batch: int = 4,
    *,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> BenchCase:
    """`sepvit_tiny` against a network of timm, both untrained; on a GPU both channels-last."""

    def prepare(device: torch.device) -> Contest:
        import timm

        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        placed: dict[str, Any] = {"device": device, "memory_format": layout}
        torch.manual_seed(0)
        images = torch.randn(batch, 3, size, size).to(**placed)
        ours, theirs = create_model("sepvit_tiny").eval(), timm.create_model(rival, **(options or {})).eval()
        return Contest(ours.to(**placed), theirs.to(**placed), lambda module: module(images), (images,), None)

    return BenchCase(
        f"sepvit_tiny/{rival}/{size}px/batch{batch}",
        f"timm {rival}",
        prepare,
        why_not_equal="two networks, neither trained",
        quantities=("forward", "forward+backward", "saved") if size == 224 else ("forward",),
        device=device,
    )


CASES = (
    upstream(32, (1, 2, 6, 2), (1, 2, 4, 8), 224, 4),
    upstream(96, (1, 2, 6, 2), (3, 6, 12, 24), 224, 4),
    upstream(96, (1, 2, 6, 2), (3, 6, 12, 24), 224, 64, device="cuda"),
    peer(SWIN),
    peer(TWINS),
    peer(CONVNEXT),
    peer(VIT),
    peer(SWIN, 448, 1, device="cpu", options={"img_size": 448}),
    peer(SWIN, 896, 1, device="cpu", options={"img_size": 896}),
    *(
        peer(rival, size, batch, device="cuda", options={"img_size": size} if rival in (SWIN, VIT) else None)
        for rival in (SWIN, TWINS, CONVNEXT, VIT)
        for size in (224, 512)
        for batch in (1, 128)
    ),
)
