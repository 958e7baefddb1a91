import math

import pytest
import torch
from torch.nn import functional as F

from narrows.errors import InvalidArgument
from narrows.ops.temporal_losses import feature_transitions, slot_contrast_loss, temporal_similarity_loss


@pytest.mark.parametrize("step", [1, 2])
def test_a_patch_moves_to_the_later_patches_it_resembles(step: int) -> None:
    features = torch.randn(2, 4, 6, 5, requires_grad=True)
    found = feature_transitions(features, step=step, temperature=0.3, threshold=0.1)
    assert not found.requires_grad
    for sample in range(2):
        for frame in range(4 - step):
            for patch in range(6):
                cosines = F.cosine_similarity(features[sample, frame, patch], features[sample, frame + step], dim=-1)
                near = cosines >= 0.1
                expected = torch.full((6,), 1 / 6)
                if near.any():
                    expected = torch.zeros(6)
                    expected[near] = (cosines[near] / 0.3).softmax(0).detach()
                torch.testing.assert_close(found[sample, frame, patch], expected)


def test_patches_that_only_change_places_are_found() -> None:
    order = torch.tensor([2, 0, 3, 1])
    first = torch.eye(4)
    clip = torch.stack((first, first[order]))[None]
    assert torch.equal(feature_transitions(clip, temperature=0.01)[0, 0].argmax(-1), order.argsort())


def test_the_loss_is_least_at_the_transitions_themselves() -> None:
    transitions = feature_transitions(torch.randn(1, 3, 5, 8))
    logits = transitions.log().clamp(min=-30)
    least = temporal_similarity_loss(logits, transitions)
    entropy = -(transitions * transitions.clamp(min=1e-30).log()).sum(-1).mean()
    torch.testing.assert_close(least, entropy)
    assert temporal_similarity_loss(torch.zeros_like(logits), transitions) > least


def test_slots_are_compared_with_all_of_the_batch_in_the_next_frame() -> None:
    slots = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    terms = []
    for frame in range(2):
        now, later = (F.normalize(slots[:, t].flatten(0, 1), dim=-1) for t in (frame, frame + 1))
        for index in range(8):
            cosines = now[index] @ later.T / 0.1
            terms.append(cosines.logsumexp(0) - cosines[index])
    torch.testing.assert_close(slot_contrast_loss(slots).double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_slots_that_stay_cost_less_than_slots_that_change_places() -> None:
    frame = torch.eye(5)[None]
    stay, change = torch.stack((frame, frame), 1), torch.stack((frame, frame.roll(1, 1)), 1)
    assert slot_contrast_loss(stay) < 0.01
    assert slot_contrast_loss(change) > 9


def test_masked_slots_are_neither_asked_nor_offered() -> None:
    slots = torch.randn(2, 3, 4, 6)
    mask = torch.tensor([[True] * 4, [False] * 4])
    torch.testing.assert_close(slot_contrast_loss(slots, mask), slot_contrast_loss(slots[:1]))
    same = slots.clone()
    same[1] = 1e3
    torch.testing.assert_close(slot_contrast_loss(same, mask), slot_contrast_loss(slots, mask))
    low = slot_contrast_loss(slots.bfloat16().requires_grad_(), mask)
    low.backward()
    assert math.isfinite(low.item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_transitions(torch.randn(1, 2, 3, 4), step=2), "more than 2 frames"),
        (lambda: temporal_similarity_loss(torch.randn(1, 1, 3, 3), torch.randn(1, 2, 3, 3)), "predicted"),
        (lambda: slot_contrast_loss(torch.randn(1, 1, 3, 4)), "two frames"),
        (lambda: slot_contrast_loss(torch.randn(1, 2, 3, 4), torch.ones(1, 2, dtype=torch.bool)), "slot_mask"),
        (lambda: slot_contrast_loss(torch.randn(1, 2, 3, 4), temperature=0.0), "temperature"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
