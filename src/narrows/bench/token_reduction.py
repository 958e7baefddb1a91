"""Whole vision transformers with reduced tokens against timm's own, untouched, with its fused attention."""

import copy
from itertools import product

import torch
from torch import Tensor

from narrows.adapters.token_reduction import Pruning, ReductionMethod, Signals, reduce_tokens
from narrows.bench.case import BenchCase, Contest
from narrows.ops.token_sampling import TokenSample

# What is left before the second, third and fourth quarter of the blocks: the rates of EViT and DynamicViT, and half the
# tokens three times, which leaves of 384 pixels in the end about as many tokens as those rates leave of 224.
RATES = (0.7, 0.49, 0.34)
HALVES = (0.5, 0.25, 0.125)

FEWER = "fewer tokens; reduce_tokens tests before that with all of them kept both compute the same"
FREE = "other tokens; as many, taken without looking at them"
MODELS = {
    "deit_small": "deit_small_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_large": "vit_large_patch16_224",
}


class FirstTokens(Pruning):
    """As many tokens as the budget allows, at no cost."""

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The first."""
        ids = torch.arange(count).expand(signals.layout.batch, -1)
        return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool))


def whole_model(
    name: str,
    size: int,
    batch: int,
    method: str,
    kept: tuple[float, ...],
    target: float | None = None,
    *,
    device: str = "cpu",
) -> BenchCase:
    """Logits of `batch` images of `size` x `size` pixels; forward only on CUDA."""
    return BenchCase(
        f"token_reduction/{name}/{size}px/batch{batch}/{method}",
        f"timm {name}",
        lambda on: _contest(name, size, batch, on, kept, method, None),
        {} if target is None else {"forward": target},
        FEWER,
        ("forward", "forward+backward", "saved") if device == "cpu" else ("forward",),
        device,
    )


def nothing_dropped(name: str, size: int, batch: int) -> BenchCase:
    """All tokens kept: the same logits, and what of a gain is not owed to fewer tokens but to another kernel."""

    def prepare(device: torch.device) -> Contest:
        return _contest(name, size, batch, device, (1.0, 1.0, 1.0), "topk", None)._replace(tolerance=1e-4)

    return BenchCase(f"token_reduction/{name}/{size}px/batch{batch}/all", f"timm {name}", prepare, device="cpu")


def sampler(name: str, size: int, batch: int, method: str) -> BenchCase:
    """What the choice of tokens costs, as a share of 1; without a target, for it is less than the noise of a race."""
    return BenchCase(
        f"token_reduction/{name}/{size}px/batch{batch}/{method}/sampler",
        "narrows, first tokens",
        lambda device: _contest(name, size, batch, device, RATES, method, FirstTokens()),
        {},
        FREE,
        ("forward",),
        "cpu",
    )


def _contest(
    name: str,
    size: int,
    batch: int,
    device: torch.device,
    kept: tuple[float, ...],
    method: str,
    rival_method: ReductionMethod | None,
) -> Contest:
    import timm

    torch.manual_seed(0)
    patch = 14 if size % 16 else 16
    with device:
        untouched = timm.create_model(MODELS[name], img_size=size, patch_size=patch).eval()
    narrows, rival = copy.deepcopy(untouched), untouched
    depth = len(untouched.blocks)  # pyright: ignore[reportArgumentType]
    budget = {depth * quarter // 4: share for quarter, share in enumerate(kept, 1)}
    reduce_tokens(narrows, method=method, budget=budget)
    if rival_method is not None:
        reduce_tokens(rival, method=rival_method, budget=budget)
    images = torch.randn(batch, 3, size, size, device=device)

    def call(module: torch.nn.Module) -> Tensor:
        return module(images)

    return Contest(narrows, rival, call, (images,), tolerance=None)


CASES = (
    whole_model("deit_small", 224, 8, "ats", RATES, 1.5),
    whole_model("deit_small", 224, 8, "topk", RATES, 1.5),
    whole_model("deit_small", 224, 8, "tome", RATES),
    nothing_dropped("deit_small", 224, 8),
    sampler("deit_small", 224, 8, "ats"),
    whole_model("vit_small", 384, 2, "ats", HALVES, 1.8),
    whole_model("vit_small", 384, 2, "topk", HALVES, 1.8),
    *(
        whole_model(name, size, batch, method, RATES if size == 224 else HALVES, device="cuda")
        for name, size, batch, method in product(
            ("deit_small", "vit_large"), (224, 384, 518), (1, 64, 256), ("ats", "topk", "tome")
        )
    ),
)
