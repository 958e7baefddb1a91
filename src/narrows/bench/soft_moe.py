"""SoftMoE and DynamicSlotsSoftMoE against soft-moe-pytorch."""

import torch

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream


def dynamic(
    batch: int, num_tokens: int, dim: int, num_experts: int, *, saved: float | None = None, device: str | None = None
) -> BenchCase:
    """Slots made from the tokens, about as many as there are tokens."""

    def prepare(device: torch.device) -> Contest:
        from soft_moe_pytorch import DynamicSlotsSoftMoE

        torch.manual_seed(0)
        rival = DynamicSlotsSoftMoE(dim, num_experts=num_experts).to(device).eval()
        tokens = torch.randn(batch, num_tokens, dim, device=device, requires_grad=True)
        return Contest(from_upstream(rival), rival, lambda module: module(tokens), (tokens,))

    name = f"soft_moe/dynamic/{batch}x{num_tokens}x{dim}/experts{num_experts}"
    targets = {**NEVER_SLOWER, "saved": saved} if saved else NEVER_SLOWER
    return BenchCase(name, "soft_moe_pytorch.DynamicSlotsSoftMoE", prepare, targets, device=device)


def fixed(
    batch: int, num_tokens: int, dim: int, num_experts: int, slots: int = 1, *, device: str | None = None
) -> BenchCase:
    """The paper's form: so many slots for each expert."""

    def prepare(device: torch.device) -> Contest:
        from soft_moe_pytorch import SoftMoE

        torch.manual_seed(0)
        rival = SoftMoE(dim, num_experts=num_experts, num_slots=slots).to(device).eval()
        tokens = torch.randn(batch, num_tokens, dim, device=device, requires_grad=True)
        return Contest(from_upstream(rival), rival, lambda module: module(tokens), (tokens,))

    name = f"soft_moe/fixed/{batch}x{num_tokens}x{dim}/experts{num_experts}" + (f"x{slots}" if slots > 1 else "")
    return BenchCase(name, "soft_moe_pytorch.SoftMoE", prepare, NEVER_SLOWER, device=device)


CASES = (
    dynamic(8, 196, 384, 28),
    dynamic(2, 1024, 384, 64),
    dynamic(8, 196, 384, 4),
    dynamic(8, 196, 384, 8),
    dynamic(1, 4096, 64, 4, saved=7.0),
    fixed(8, 196, 384, 64),
    dynamic(64, 196, 384, 28, device="cuda"),
    dynamic(16, 1024, 768, 64, device="cuda"),
    fixed(64, 256, 768, 128, 2, device="cuda"),
)
