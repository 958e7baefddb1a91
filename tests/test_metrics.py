"""Metrics of objects, against scikit-learn, by hand, and where they are not defined."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType
from narrows.metrics import (
    ARI,
    FGARI,
    IGNORED,
    MBO,
    CorLoc,
    MatchedIoU,
    ObjectMetric,
    adjusted_rand_index,
    count_overlaps,
)

METRICS = (ARI, FGARI, MBO, MatchedIoU, CorLoc)


def _score(metric: type[ObjectMetric], prediction: object, truth: object, **options: int) -> float:
    measured = metric(**options)
    measured.update(torch.as_tensor(prediction)[None], torch.as_tensor(truth)[None])
    return measured.compute().item()


def test_ari_is_scikit_learns_on_a_thousand_random_pairs() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = (20, *random.integers(1, 9, 2))
        found, there = (random.integers(0, random.integers(1, 7), shape) for _ in range(2))
        overlaps = count_overlaps(torch.as_tensor(found), torch.as_tensor(there))
        whole, foreground = adjusted_rand_index(overlaps), adjusted_rand_index(overlaps, foreground=True)
        for index in range(20):
            ours, theirs, inside = found[index].ravel(), there[index].ravel(), there[index].ravel() > 0
            assert whole[index].item() == pytest.approx(adjusted_rand_score(theirs, ours), abs=1e-12)
            expected = adjusted_rand_score(theirs[inside], ours[inside]) if inside.any() else math.nan
            assert foreground[index].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


TRUTH = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 0], [2, 2, 0, 0]]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # Found as it is: ARI, FG-ARI, mBO, mIoU, CorLoc.
        (TRUTH, (1, 1, 1, 1, 1)),
        # Objects in one segment: it serves both for mBO, one for mIoU; the box around it is the whole image.
        ([[int(t > 0) for t in row] for row in TRUTH], (None, 0, 0.5, 0.25, 0)),
        # Everything in one segment.
        ([[0] * 4] * 4, (0, 0, 0.25, 0.125, 0)),
        # The second object split in two columns; each half has an IoU of a half with it.
        ([[0, 0, 1, 1], [0, 0, 1, 1], [2, 3, 0, 0], [2, 3, 0, 0]], (None, None, 0.75, 0.75, 1)),
    ],
)
def test_by_hand(prediction: list[list[int]], expected: tuple[float | None, ...]) -> None:
    for metric, value in zip(METRICS, expected, strict=True):
        if value is not None:
            assert _score(metric, prediction, TRUTH) == pytest.approx(value)


def test_of_masks_the_greatest_counts_and_of_true_masks_every_one() -> None:
    labels = torch.tensor(TRUTH)
    soft = torch.stack([(labels == k) * 0.4 + 0.3 for k in (2, 0, 1)])
    masks = torch.stack([labels == 1, labels == 2])
    for metric in METRICS:
        assert _score(metric, soft, masks) == pytest.approx(1)
        assert _score(metric, soft > 0.5, labels) == pytest.approx(1)


def test_pixels_of_several_objects_and_those_not_known_do_not_count() -> None:
    labels = torch.tensor(TRUTH)
    masks = torch.stack([labels == 1, labels == 2])
    masks[1, 0, 2:] = True  # claimed by both
    found = labels.clone()
    found[0, 2:] = 7  # and wrong there
    unknown = labels.clone()
    unknown[0, 2:] = 255
    for metric in METRICS:
        assert _score(metric, found, masks) == pytest.approx(1)
        assert _score(metric, found, unknown, ignored=255) == pytest.approx(1)


def test_where_a_metric_is_not_defined_the_sample_does_not_count() -> None:
    labels = torch.tensor(TRUTH)
    nothing = torch.zeros_like(labels)
    for metric in (FGARI, MBO, MatchedIoU, CorLoc):
        measured = metric()
        measured.update(torch.stack([labels, labels]), torch.stack([nothing, labels]))
        assert measured.compute() == 1
        assert math.isnan(_score(metric, labels, nothing))
    assert math.isnan(_score(ARI, labels, torch.full_like(labels, IGNORED)))
    assert _score(ARI, nothing, nothing) == 1
    assert _score(FGARI, nothing, labels.clamp(max=1)) == 1  # one object in one segment
    assert _score(FGARI, labels.cumsum(1), labels.clamp(max=1)) == 0  # and split


def test_a_clip_is_one_sample_so_objects_keep_their_numbers() -> None:
    labels = torch.tensor(TRUTH)
    clip = torch.stack([labels, labels])
    swapped = torch.stack([labels, torch.tensor([0, 2, 1])[labels]])
    for metric in (ARI, FGARI, MBO, MatchedIoU):
        assert _score(metric, clip, clip) == pytest.approx(1)
        assert _score(metric, swapped, clip) < 0.8
    with pytest.raises(InvalidArgument, match="CorLoc is not defined on clips"):
        _score(CorLoc, clip, clip)


def test_padding_other_samples_and_the_order_of_labels_change_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    found, there = (torch.randint(0, 5, (6, 8, 8), generator=random) for _ in range(2))
    for metric in METRICS:
        together = metric()
        together.update(found, there)
        alone = [_score(metric, found[i], there[i]) for i in range(6)]
        assert together.compute().item() == pytest.approx(np.mean(alone))
        renamed = (found * 700_000 + 3, torch.where(there > 0, 900_000 - there, 0))
        assert [_score(metric, renamed[0][i], renamed[1][i]) for i in range(6)] == pytest.approx(alone)


NOTHING = torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        (
            torch.zeros(1, 4, 4).long(),
            torch.zeros(1, 4, 5).long(),
            InvalidArgument,
            r"truth: expected the pixels of the",
        ),
        (torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4), InvalidType, "truth: expected integer labels or boolean"),
        (
            torch.zeros(1, 4, 4).long(),
            torch.zeros(1, 4, 4) > 0,
            InvalidArgument,
            r"truth: expected masks \[B, M, \*pix",
        ),
        (torch.zeros(1, 4, 4).long() - 1, torch.zeros(1, 4, 4).long(), InvalidArgument, "labels of 0 and more, got -1"),
        (torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long() - 2, InvalidArgument, "or -100 to ignore, got -2"),
    ],
)
def test_bad_input_is_named(prediction: Tensor, truth: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FGARI().update(prediction, truth)


def test_processes_add_up() -> None:
    found, there = torch.randint(0, 4, (8, 6, 6)), torch.randint(0, 4, (8, 6, 6))
    whole, parts = FGARI(), [FGARI(), FGARI()]
    whole.update(found, there)
    for part, rows in zip(parts, (slice(0, 3), slice(3, 8)), strict=True):
        part.update(found[rows], there[rows])

    def gather(tensor: Tensor, group: object) -> list[Tensor]:
        assert group is None
        return [tensor, parts[1].total if tensor.is_floating_point() else parts[1].samples]

    summed = FGARI(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    summed.total, summed.samples = parts[0].total, parts[0].samples
    summed._update_count = 1
    assert summed.compute().item() == pytest.approx(whole.compute().item())
