"""What keeps slots on their objects through a clip: temporal feature similarity (VideoSAUR), slot contrast."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.validation import check_mask, check_positive, check_positive_number


def feature_transitions(
    features: Float[Tensor, "B T N D"], *, step: int = 1, temperature: float = 0.1, threshold: float = 0.0
) -> Float[Tensor, "B later N N"]:
    r"""To which patches of a later frame each patch seems to move (Zadaianchuk et al. 2023, section 3.2).

    \[ P_{ij} = \mathrm{softmax}_j\big(\cos(f^t_i, f^{t+k}_j) / \tau\big) \quad \text{over } j
       \text{ with } \cos \geq \text{threshold} \]

    A patch that no later patch resembles that much is uniform over all. No gradient flows to the features.

    Args:
        features: `[B, T, N, D]` of a frozen encoder.
        step: k, frames between the two.
        temperature: tau.
        threshold: least cosine of patches that count.

    Raises:
        InvalidArgument: a clip of `step` frames or fewer.

    https://arxiv.org/abs/2306.04829
    """
    check_positive(step=step)
    check_positive_number(temperature=temperature)
    if features.shape[1] <= step:
        raise InvalidArgument("features", expected=f"more than {step} frames", got=features.shape[1])
    unit = F.normalize(features.detach().float(), dim=-1)
    cosine = unit[:, :-step] @ unit[:, step:].mT
    near = cosine >= threshold
    logits = (cosine / temperature).masked_fill(~near & near.any(-1, keepdim=True), -torch.inf)
    return logits.masked_fill(~near.any(-1, keepdim=True), 0).softmax(-1)


def temporal_similarity_loss(
    predicted: Float[Tensor, "*logits"], transitions: Float[Tensor, "B later N N"]
) -> Float[Tensor, ""]:
    """Cross entropy of what a decoder predicts of transitions, `[B, T - k, N, N]` logits, mean over patches."""
    if predicted.shape != transitions.shape:
        raise InvalidArgument("predicted", expected=f"shape {tuple(transitions.shape)}", got=tuple(predicted.shape))
    return -(transitions * predicted.float().log_softmax(-1)).sum(-1).mean()


def slot_contrast_loss(
    slots: Float[Tensor, "B T K S"], slot_mask: Bool[Tensor, "*mask"] | None = None, *, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """A slot should be most like itself in the next frame, among all slots of the batch (Manasyan et al. 2025, eq. 4).

    Args:
        slots: `[B, T, K, S]`, of a clip of at least two frames.
        slot_mask: `[B, K]`, True at real slots: the others are neither asked nor offered.
        temperature: divides the cosines.

    Raises:
        InvalidArgument: a single frame, no real slot, a mask of another shape.

    https://arxiv.org/abs/2412.14295
    """
    check_positive_number(temperature=temperature)
    if slots.shape[1] < 2:
        raise InvalidArgument("slots", expected="a clip of at least two frames", got=f"{slots.shape[1]}")
    check_mask("slot_mask", slot_mask, (slots.shape[0], slots.shape[2]), layout="[B, K]")
    unit = F.normalize(slots.float(), dim=-1).transpose(0, 1).flatten(1, 2)  # [T, B K, S]
    logits = unit[:-1] @ unit[1:].mT / temperature
    itself = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:-1])
    if slot_mask is None:
        return F.cross_entropy(logits.flatten(0, 1), itself.flatten())
    present = slot_mask.flatten()
    logits = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
    losses = F.cross_entropy(logits.flatten(0, 1), itself.flatten(), reduction="none").view(itself.shape)
    return (losses * present).sum() / (present.sum() * len(losses)).clamp(min=1)
