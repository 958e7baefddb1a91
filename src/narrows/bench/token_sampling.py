"""Attention with adaptive token sampling, and a classifier made of it, against `vit_pytorch.ats_vit`."""

import torch
from torch import Tensor, nn

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream
from narrows.layers.token_sampling import AdaptiveTokenSampler, SampledAttention

OTHER_TOKENS = "quantiles keep other tokens than upstream's random draws, and more of them"


def attention(batch: int, num_tokens: int, dim: int, keep: int, *, sampling: str) -> BenchCase:
    """Norm and attention of one block, heads of 64; the sum of what it returns for the tokens it keeps."""

    def prepare(device: torch.device) -> Contest:
        from vit_pytorch.ats_vit import Attention

        torch.manual_seed(0)
        rival = Attention(dim, heads=dim // 64, output_num_tokens=keep).to(device).eval()
        sampler = AdaptiveTokenSampler(keep, sampling=sampling)
        layer = SampledAttention(dim, sampler=sampler, heads=dim // 64, qkv_bias=False)
        narrows = nn.Sequential(nn.LayerNorm(dim), layer).to(device).eval()
        for ours, theirs in ((narrows[0], rival.norm), (layer.qkv, rival.to_qkv), (layer.out, rival.to_out[0])):
            ours.load_state_dict(theirs.state_dict())
        tokens = torch.randn(batch, num_tokens, dim, device=device)
        everything = torch.ones(batch, num_tokens, dtype=torch.bool, device=device)

        def call(module: nn.Module) -> Tensor:
            if module is rival:
                attended, mask, _ = module(tokens, mask=everything)
            else:
                attended, _, mask = module(tokens)
            return (attended * mask[..., None]).sum(1)

        tolerance = 1e-4 if sampling == "gumbel" else None
        return Contest(narrows, rival, call, (tokens,), tolerance, continuous=False)

    return BenchCase(
        f"token_sampling/{sampling}/{batch}x{num_tokens}x{dim}/keep{keep}",
        "vit_pytorch.ats_vit.Attention",
        prepare,
        NEVER_SLOWER,
        "" if sampling == "gumbel" else OTHER_TOKENS,
    )


def classifier(size: int, batch: int, max_tokens_per_depth: tuple[int, ...], *, device: str | None = None) -> BenchCase:
    """A whole small network on images of `size` x `size` pixels in patches of 16, 384 wide, one sampling to half."""

    def prepare(device: torch.device) -> Contest:
        from vit_pytorch.ats_vit import ViT

        torch.manual_seed(0)
        rival = ViT(
            image_size=size,
            patch_size=16,
            num_classes=1000,
            dim=384,
            depth=len(max_tokens_per_depth),
            max_tokens_per_depth=max_tokens_per_depth,
            heads=6,
            mlp_dim=1536,
        )
        rival = rival.to(device).eval()
        images = torch.randn(batch, 3, size, size, device=device)

        return Contest(from_upstream(rival), rival, lambda module: module(images), (images,), continuous=False)

    name = f"token_sampling/vit/{size}px/batch{batch}"
    return BenchCase(name, "vit_pytorch.ats_vit.ViT", prepare, NEVER_SLOWER, device=device)


CASES = (
    attention(8, 197, 384, 98, sampling="gumbel"),
    attention(4, 577, 384, 144, sampling="gumbel"),
    attention(2, 1025, 768, 256, sampling="gumbel"),
    attention(8, 197, 384, 98, sampling="quantile"),
    attention(4, 577, 384, 144, sampling="quantile"),
    attention(2, 1025, 768, 256, sampling="quantile"),
    classifier(224, 4, (196, 196, 196, 98, 98, 98)),
    classifier(224, 128, (196, 196, 98, 98, 49, 49), device="cuda"),
)
