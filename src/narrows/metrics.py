r"""How well objects were found without labels: ARI, FG-ARI, P-ARI, mBO, mIoU and CorLoc, of images and of clips.

Each metric takes what a model found and what is there, and is the mean over the samples it is defined for. A clip is
one sample: an object has to keep its number through all frames.

What is found (`prediction`) is a label for each pixel, `[B, *pixels]`, or masks `[B, K, *pixels]`, of which the
greatest counts. What is there (`truth`) is a label for each pixel, 0 on the background and `ignored` where nothing is
known; or boolean masks of the objects `[B, M, *pixels]`. Pixels of several masks are ignored, as in the code of
DINOSAUR. `pixels` is `H W` for images and `T H W` for clips. Both are of one size: see `docs/objects.md`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from narrows.errors import InvalidArgument, InvalidType, MissingExtra

try:
    from scipy.optimize import linear_sum_assignment
    from torchmetrics import Metric
except ImportError as error:
    raise MissingExtra(error.name or "torchmetrics", extra="train", purpose="score objects") from error

IGNORED = -100
"""The label of pixels that do not count, as in `torch.nn.functional.cross_entropy` and in the images of `narrows`."""


class Overlaps(NamedTuple):
    """How many pixels of each segment that was found lie in each that is there.

    Args:
        counts: `[B, K, M + 1]`; the last axis begins with the background.
        found: `[B, K]`, pixels of each segment found.
        there: `[B, M + 1]`, pixels of each segment that is there.
    """

    counts: Float[Tensor, "B K M1"]
    found: Float[Tensor, "B K"]
    there: Float[Tensor, "B M1"]


def count_overlaps(prediction: Tensor, truth: Tensor, *, ignored: int = IGNORED) -> Overlaps:
    """Pixels that segments share, without those that are ignored.

    Raises:
        InvalidArgument: shapes that do not match.
        InvalidType: labels that are not integers.
    """
    found = _found(prediction)
    labels = _there(truth, ignored, pixels=found.ndim - 1)
    if found.shape != labels.shape:
        raise InvalidArgument(
            "truth",
            expected=f"the pixels of the prediction, {tuple(found.shape)}",
            got=f"{tuple(labels.shape)}",
            hint="Resize masks by nearest neighbours, or predictions to the size of the masks.",
        )
    found, labels = found.flatten(1), labels.flatten(1)
    known = labels != IGNORED
    rows, columns = (int(each.max()) + 1 if each.numel() else 1 for each in (found, labels.where(known, 0)))
    batch = torch.arange(len(found), device=found.device).unsqueeze(1)
    cells = (batch * rows + found) * columns + labels.where(known, 0)
    counts = torch.zeros(len(found) * rows * columns, dtype=torch.float64, device=found.device)
    counts.index_add_(0, cells.flatten(), known.flatten().double())
    counts = counts.view(len(found), rows, columns)
    return Overlaps(counts, counts.sum(2), counts.sum(1))


def adjusted_rand_index(overlaps: Overlaps, *, foreground: bool = False) -> Float[Tensor, "B"]:
    r"""The adjusted Rand index of each sample (Hubert and Arabie 1985, eq. 5); NaN where no pixel counts.

    \[ \mathrm{ARI} = \frac{\sum_{ij} \binom{n_{ij}}{2} - E}{\frac12 (A + B) - E}, \quad
       A = \sum_i \binom{n_{i\cdot}}{2}, \; B = \sum_j \binom{n_{\cdot j}}{2}, \; E = A B / \binom{n}{2} \]

    1 where both are the same trivial partition (the denominator is 0), as in scikit-learn and in the code of SAVi. With
    one object alone, a prediction that splits it thus gets 0 and one that does not gets 1.

    Args:
        foreground: without the pixels of the true background (FG-ARI).
    """
    counts = overlaps.counts[..., 1:] if foreground else overlaps.counts
    both, rows, columns = (_pairs(n) for n in (counts, counts.sum(2), counts.sum(1)))
    pixels = counts.sum((1, 2))
    agreed, found, there = both.sum((1, 2)), rows.sum(1), columns.sum(1)
    expected = found * there / _pairs(pixels).clamp(min=1)
    spread = (found + there) / 2 - expected
    index = torch.where(spread == 0, 1.0, (agreed - expected) / spread.where(spread != 0, 1.0))
    return index.masked_fill(pixels == 0, torch.nan)


def best_overlap(overlaps: Overlaps) -> Float[Tensor, "B"]:
    r"""Mean best overlap of each sample: the mean over objects of the greatest IoU with any segment found.

    \[ \mathrm{mBO} = \frac1M \sum_m \max_k \frac{|S_k \cap O_m|}{|S_k \cup O_m|} \]

    One segment may serve several objects. NaN where there is no object. With instances as truth this is mBO^i, with
    classes mBO^c (Pont-Tuset et al. 2017; Seitzer et al. 2023).
    """
    iou, present = _iou(overlaps)
    best = iou.amax(1) if iou.shape[1] else iou.new_zeros(present.shape)
    return (best * present).sum(1) / present.sum(1)  # 0 / 0 is NaN


def matched_iou(overlaps: Overlaps) -> Float[Tensor, "B"]:
    """Mean IoU of each sample over objects matched one to one with segments found, the best such matching (Hungarian).

    An object without a segment of its own counts 0. NaN where there is no object.
    """
    iou, present = _iou(overlaps)
    scores = []
    for sample, count in zip(iou.cpu(), present.sum(1).tolist(), strict=True):
        rows, columns = linear_sum_assignment(sample.numpy(), maximize=True)
        scores.append(float(sample[rows, columns].sum()) / count if count else torch.nan)
    return torch.tensor(scores, dtype=iou.dtype, device=iou.device)


def localised(prediction: Tensor, truth: Tensor, *, ignored: int = IGNORED) -> Float[Tensor, "B"]:
    """Correct localisation of each image: 1 where the box around a segment found has an IoU of at least a half with
    the box around an object (Deselaers et al. 2010), else 0; NaN where there is no object.
    """
    found = _found(prediction)
    labels = _there(truth, ignored, pixels=found.ndim - 1)
    if found.ndim != 3:
        raise InvalidArgument("prediction", expected="images: CorLoc is not defined on clips", got=tuple(found.shape))
    ours, theirs = _boxes(found.where(labels != IGNORED, -1), first=0), _boxes(labels, first=1)
    corner = torch.maximum(ours[:, :, None, :2], theirs[:, None, :, :2])
    shared = (torch.minimum(ours[:, :, None, 2:], theirs[:, None, :, 2:]) - corner).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (ours, theirs)]
    iou = shared / (areas[0][:, :, None] + areas[1][:, None] - shared).clamp(min=1)
    hit = (iou >= 0.5).flatten(1).any(1).double()
    return hit.masked_fill((areas[1] == 0).all(1), torch.nan)


class ObjectMetric(Metric):
    """Mean of a score over the samples it is defined for; NaN before there is one.

    Args:
        score: of a prediction and a truth, a number for each sample; NaN where it is not defined.
        ignored: the label of pixels of the truth that do not count.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, score: Callable[..., Tensor], *, ignored: int = IGNORED, **options: Any) -> None:
        super().__init__(**options)
        self.score, self.ignored = score, ignored
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Take in a batch: labels `[B, *pixels]` or masks `[B, K, *pixels]`, and what is there (see the module)."""
        scores = self.score(prediction, truth, ignored=self.ignored)
        self.total += scores.nansum()
        self.samples += scores.isfinite().sum()

    def compute(self) -> Tensor:
        """The mean over samples."""
        return self.total / self.samples


def _of_overlaps(score: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def scored(prediction: Tensor, truth: Tensor, *, ignored: int) -> Tensor:
        return score(count_overlaps(prediction, truth, ignored=ignored), **options)

    return scored


class ARI(ObjectMetric):
    """Adjusted Rand index over all pixels that are known, the background a segment of its own.

    With panoptic labels (things and stuff) as truth this is P-ARI (Didolkar et al. 2024).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(_of_overlaps(adjusted_rand_index), **options)


class FGARI(ObjectMetric):
    """Adjusted Rand index over the pixels of true objects (Greff et al. 2019); a split background costs nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(_of_overlaps(adjusted_rand_index, foreground=True), **options)


class MBO(ObjectMetric):
    """Mean best overlap: of instances mBO^i, of classes mBO^c, after which segments the truth holds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(_of_overlaps(best_overlap), **options)


class MatchedIoU(ObjectMetric):
    """Mean IoU of objects and segments matched one to one (Hungarian)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(_of_overlaps(matched_iou), **options)


class CorLoc(ObjectMetric):
    """Share of images in which an object is localised, by the boxes around segments, at an IoU of one half."""

    def __init__(self, **options: Any) -> None:
        super().__init__(localised, **options)


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2


def _iou(overlaps: Overlaps) -> tuple[Float[Tensor, "B K M"], Float[Tensor, "B M"]]:
    """IoU of segments and objects, and which objects there are."""
    shared, there = overlaps.counts[..., 1:], overlaps.there[:, 1:]
    union = overlaps.found[..., None] + there[:, None] - shared
    return shared / union.clamp(min=1), (there > 0).double()


def _found(prediction: Tensor) -> Tensor:
    """A label for each pixel, from 0 on without gaps."""
    if prediction.is_floating_point():
        return prediction.argmax(1)
    if prediction.dtype == torch.bool:
        return prediction.to(torch.uint8).argmax(1)
    if prediction.numel() and int(prediction.min()) < 0:
        raise InvalidArgument("prediction", expected="labels of 0 and more", got=int(prediction.min()))
    return prediction.unique(return_inverse=True)[1]


def _there(truth: Tensor, ignored: int, *, pixels: int) -> Tensor:
    """A label for each pixel, from 0, the background, on without gaps; `IGNORED` where nothing is known."""
    if truth.is_floating_point():
        raise InvalidType("truth", expected="integer labels or boolean masks", got=f"dtype {truth.dtype}")
    if truth.dtype == torch.bool:
        if truth.ndim != pixels + 2:
            raise InvalidArgument("truth", expected="masks [B, M, *pixels]", got=f"shape {tuple(truth.shape)}")
        covered = truth.sum(1)
        number = torch.arange(1, truth.shape[1] + 1, device=truth.device).view(-1, *(1 for _ in range(pixels)))
        return (truth * number).sum(1).masked_fill(covered > 1, IGNORED)
    labels = truth.long()
    if labels.numel() and bool(((labels < 0) & (labels != ignored)).any()):
        raise InvalidArgument("truth", expected=f"labels of 0 and more, or {ignored} to ignore", got=int(labels.min()))
    known = labels != ignored
    values = torch.cat([labels.new_zeros(1), labels.where(known, 0).flatten()]).unique(return_inverse=True)[1]
    return values[1:].view_as(labels).where(known, IGNORED)


def _boxes(labels: Tensor, *, first: int) -> Float[Tensor, "B K 4"]:
    """Top, left, bottom and right of each label from `first` on; all 0 where it does not occur."""
    count = max(int(labels.max()) + 1 if labels.numel() else 0, first)
    masks = labels[:, None] == torch.arange(first, count, device=labels.device).view(-1, 1, 1)
    edges = []
    for axis in (3, 2):
        line = masks.any(axis).double()
        start, length = line.argmax(-1), line.shape[-1]
        edges.append((start, (length - line.flip(-1).argmax(-1)) * line.any(-1)))
    (top, bottom), (left, right) = edges
    return torch.stack((top, left, bottom, right), -1).double()
