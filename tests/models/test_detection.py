"""SepViT as the backbone of a detection model of torchvision, on digit scenes."""

import pytest
import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from narrows import create_model
from narrows.data import IGNORED
from narrows.data.scenes import SegmentedDigits
from narrows.models import PyramidNetwork

SCENES = SegmentedDigits(digits=(1, 3))


def _detector() -> FCOS:
    backbone = create_model(
        "sepvit_lite", features_only=True, channels=1, depths=(1, 1, 1, 1), window_size=(4, 4, 4, 2)
    )
    return FCOS(
        PyramidNetwork(backbone, 32),
        num_classes=11,
        anchor_generator=AnchorGenerator(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((1.0,),) * 4),
        min_size=64,
        max_size=96,
        image_mean=[0.35],
        image_std=[0.24],
    )


def _examples(indices):
    rendered = SCENES.render(indices)
    there = rendered.labels != IGNORED
    columns = zip(rendered.boxes, rendered.labels, there, strict=True)
    return list(rendered.images / 255), [{"boxes": box[t], "labels": label[t]} for box, label, t in columns]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_detector_learns_where_digits_are():
    model = _detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(50):
        loss = sum(model(*_examples(range(8 * step, 8 * step + 8))).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    model.eval()
    images, targets = _examples(range(1000, 1020))
    with torch.no_grad():
        found = model(images)
    best = torch.stack([box_iou(f["boxes"][:1], t["boxes"]).max() for f, t in zip(found, targets, strict=True)])
    assert best.median() > 0.5  # of the likeliest box with the nearest digit


def test_images_of_different_sizes_are_one_batch():
    model = _detector().eval()
    with torch.no_grad():
        found = model([torch.rand(1, 64, 64), torch.rand(1, 64, 90)])
    assert len(found) == 2
    assert all(set(answer) == {"boxes", "scores", "labels"} for answer in found)
