"""SlotAttention and TwoWaySlotAttention against slot-attention."""

import torch
from torch import Tensor, nn

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream


def against(
    rival: str, shape: tuple[int, int, int], *, num_slots: int, device: str | None = None, **options: int
) -> BenchCase:
    """A class of slot-attention with its default biases and normalisation, on tokens of `shape`."""

    def prepare(device: torch.device) -> Contest:
        import slot_attention

        torch.manual_seed(0)
        module = getattr(slot_attention, rival)(num_slots, shape[-1], **options).to(device).eval()
        tokens = torch.randn(shape, device=device, requires_grad=True)

        def call(module: nn.Module) -> Tensor:
            output = module(tokens)
            if isinstance(output, Tensor):
                return output
            return torch.cat([part for part in output if part.shape[-1] == shape[-1]], 1)  # slots and tokens

        return Contest(from_upstream(module), module, call, (tokens,))

    settings = "".join(f"/{name}{value}" for name, value in {"slots": num_slots, **options}.items())
    return BenchCase(
        f"slot_attention/{rival}/{'x'.join(map(str, shape))}{settings}",
        f"slot_attention.{rival}",
        prepare,
        NEVER_SLOWER,
        device=device,
    )


CASES = (
    against("SlotAttention", (4, 1369, 256), num_slots=7),
    against("SlotAttention", (4, 4096, 256), num_slots=8),
    against("MultiHeadSlotAttention", (4, 1369, 256), num_slots=7, heads=4),
    against("SlotAttentionExperimental", (2, 4096, 256), num_slots=16),
    against("SlotAttention", (64, 1369, 256), num_slots=7, device="cuda"),
    against("SlotAttention", (64, 4096, 256), num_slots=16, device="cuda"),
    against("SlotAttentionExperimental", (16, 4096, 256), num_slots=16, device="cuda"),
)
