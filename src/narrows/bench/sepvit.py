"""SepViT against `vit_pytorch.sep_vit.SepViT`."""

from collections.abc import Sequence

import torch

from narrows.bench.case import BenchCase, Contest
from narrows.checkpoints import from_upstream


def sepvit(dim: int, depth: Sequence[int], heads: Sequence[int], size: int, batch: int) -> BenchCase:
    """A whole network on images of `size` x `size` pixels."""

    def prepare(device: torch.device) -> Contest:
        from vit_pytorch.sep_vit import SepViT

        torch.manual_seed(0)
        rival = SepViT(num_classes=1000, dim=dim, depth=tuple(depth), heads=tuple(heads)).to(device).eval()
        images = torch.randn(batch, 3, size, size, device=device)
        return Contest(from_upstream(rival), rival, lambda module: module(images), (images,))

    widths = "-".join(str(dim * 2**stage) for stage in range(len(depth)))
    return BenchCase(
        f"sepvit/{widths}/{size}px/batch{batch}", "vit_pytorch.sep_vit.SepViT", prepare, targets={"forward": 1.7}
    )


CASES = (sepvit(32, (1, 2, 6, 2), (1, 2, 4, 8), 224, 4),)
