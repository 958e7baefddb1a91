"""Memory on a GPU against the packages people use today."""

from collections.abc import Callable, Sequence

import pytest
import slot_attention
import soft_moe_pytorch
import torch
from torch import nn

from narrows import from_upstream
from tests.memory import peak_on_a_gpu
from tests.support import needs


def fixed(dim: int, num_experts: int, slots: int, **options: bool) -> Callable[[], nn.Module]:
    return lambda: soft_moe_pytorch.SoftMoE(
        dim, num_experts=num_experts, num_slots=slots, offload_unused_experts_to_cpu=False, **options
    )


def dynamic(dim: int, num_experts: int, **options: bool) -> Callable[[], nn.Module]:
    return lambda: soft_moe_pytorch.DynamicSlotsSoftMoE(dim, num_experts=num_experts, **options)


SOFT_MIXTURES = {
    "fixed": (fixed(768, 128, 2), (64, 256, 768)),
    "fixed, few rows": (fixed(384, 16, 1), (8, 196, 384)),
    "fixed, many rows": (fixed(256, 4, 16), (64, 256, 256)),
    "fixed, gated, many rows": (fixed(256, 8, 8, geglu=True), (256, 256, 256)),
    "dynamic": (dynamic(384, 28), (64, 196, 384)),
    "dynamic, few rows": (dynamic(768, 8), (4, 512, 768)),
    "dynamic, gated": (dynamic(384, 7, geglu=True), (8, 196, 384)),
    "dynamic, gated, many rows": (dynamic(256, 8, geglu=True), (64, 256, 256)),
    "dynamic, many tokens": (dynamic(64, 4), (1, 1024, 64)),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", SOFT_MIXTURES)
def test_a_soft_mixture_takes_no_more_memory_than_upstream(name: str, backward: bool) -> None:
    rival, shape = SOFT_MIXTURES[name]
    with torch.device("meta"):
        theirs = rival()
        ours = from_upstream(theirs)

    def call(module: nn.Module, device: torch.device) -> torch.Tensor:
        return module(torch.empty(shape, device=device, dtype=torch.bfloat16, requires_grad=True))

    assert peak_on_a_gpu(lambda: ours, call, backward=backward) <= peak_on_a_gpu(
        lambda: theirs, call, backward=backward
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", SOFT_MIXTURES)
def test_a_mask_takes_no_more_memory_than_upstream(name: str, backward: bool) -> None:
    """In float32 where upstream's masks fail in bfloat16."""
    rival, shape = SOFT_MIXTURES[name]
    dtype = torch.float32 if name.startswith("dynamic") else torch.bfloat16
    with torch.device("meta"):
        theirs = rival()
        ours = from_upstream(theirs)

    def call(module: nn.Module, device: torch.device) -> torch.Tensor:
        mask = torch.ones(shape[:2], device=device, dtype=torch.bool)
        return module(torch.empty(shape, device=device, dtype=dtype, requires_grad=True), mask=mask)

    own = peak_on_a_gpu(lambda: ours, call, dtype=dtype, backward=backward)
    assert own <= peak_on_a_gpu(lambda: theirs, call, dtype=dtype, backward=backward)


@pytest.mark.parametrize(
    ("dtype", "batch", "backward", "share"),
    [
        (torch.bfloat16, 32, True, 0.2),  # 131,072 tokens; half was asked for
        (torch.float32, 16, False, 0.95),
        (torch.float32, 16, True, 0.35),
    ],
    ids=["training", "float32", "float32, training"],
)
def test_two_way_slot_attention_takes_a_share_of_upstreams_memory(
    dtype: torch.dtype, batch: int, backward: bool, share: float
) -> None:
    """In bfloat16 by kernels, in float32 in plain operations."""
    needs("torch", "2.15")  # older ones run no GRU, which upstream has, on tensors that are only counted
    with torch.device("meta"):
        theirs = slot_attention.SlotAttentionExperimental(16, 256)
        ours = from_upstream(theirs)

    def call(module: nn.Module, device: torch.device) -> Sequence[torch.Tensor]:
        tokens = torch.empty(batch, 4096, 256, device=device, dtype=dtype, requires_grad=True)
        return module(tokens)[:2]  # slots and tokens

    own, other = (
        peak_on_a_gpu(lambda module=module: module, call, dtype=dtype, backward=backward) for module in (ours, theirs)
    )
    assert own <= share * other
