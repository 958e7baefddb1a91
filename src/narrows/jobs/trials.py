"""One model under several reductions, measured side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from narrows.adapters import Reduction
from narrows.hub.models import LoadedModel
from narrows.jobs.images import Images
from narrows.measure import Spread, Timing, compare_speed, count_macs, evaluating, peak_memory
from narrows.routing import Routing

COUNTED = 32  # images whose MACs are counted one by one


@dataclass(frozen=True)
class Judgement:
    """What a model makes of the images.

    Args:
        agreement: with the untouched model: the part of the images that get the same class; for a model that gives
            features, the mean cosine between them.
        accuracy: the part of the images that get the right class; None without labels.
    """

    agreement: float
    accuracy: float | None


@dataclass(frozen=True)
class Trial:
    """A model under one reduction, or untouched.

    Args:
        method: what reduces; "untouched".
        budget: as it was asked for.
        reduction: the handle, removed; None of the untouched model.
        judgement: on all images.
        macs: multiply-accumulates of each of the first images, with the tokens really kept.
        kept: tokens beside the prefix that are left at the end, on average.
        timing: seconds for a batch.
        batch: images in it.
        memory: greatest number of bytes that it has alive beyond weights and images.
    """

    method: str
    budget: str
    reduction: Reduction | None
    judgement: Judgement
    macs: tuple[int, ...]
    kept: float
    timing: Timing
    batch: int
    memory: int

    @property
    def name(self) -> str:
        """Method and budget: "ats 0.5"."""
        return f"{self.method} {self.budget}".strip()

    @property
    def throughput(self) -> Spread:
        """Images per second."""
        return Spread(tuple(self.batch / seconds for seconds in self.timing.samples))

    @property
    def quality(self) -> float:
        """Accuracy, or where there are no labels agreement."""
        return self.judgement.agreement if self.judgement.accuracy is None else self.judgement.accuracy


@contextmanager
def applied(reduction: Reduction | None) -> Iterator[None]:
    """The model reduced by a reduction that was removed, or untouched by None."""
    if reduction is None:
        yield
        return
    reduction.attach()
    try:
        yield
    finally:
        reduction.remove()


def run_trials(
    opened: LoadedModel,
    reductions: Mapping[tuple[str, str], Reduction | None],
    images: Images,
    *,
    batch_size: int,
    device: torch.device,
) -> list[Trial]:
    """Every reduction on the same images, speeds taken in turns.

    Args:
        opened: the model, untouched.
        reductions: handles that were removed again, and None for the untouched model first, by method and budget.
        images: to judge by; the first batch of them measures speed and memory.
        batch_size: images in a batch.
        device: where the model is.
    """
    first, _ = images.batch(range(min(batch_size, len(images))))
    first = first.to(device)
    with evaluating(opened.module):
        judgements = _judge(opened, list(reductions.values()), images, batch_size, device)
        calls = {name: partial(_call, opened, reduction, first) for name, reduction in reductions.items()}
        by_name = {" ".join(name): call for name, call in calls.items()}
        timings = compare_speed(by_name, repeats=7, device=device)
        bar = tqdm(reductions.items(), desc="counting", unit="model", disable=None, leave=False)
        return [
            Trial(
                method,
                budget,
                reduction,
                judgements[number],
                macs=count_each(opened, reduction, first[:COUNTED]),
                kept=_kept(opened, reduction, first),
                timing=timings[f"{method} {budget}"],
                batch=len(first),
                memory=peak_memory(calls[method, budget], device),
            )
            for number, ((method, budget), reduction) in enumerate(bar)
        ]


def count_each(opened: LoadedModel, reduction: Reduction | None, images: Float[Tensor, "B C H W"]) -> tuple[int, ...]:
    """Multiply-accumulates of each image alone."""
    if reduction is None:
        return (count_macs(lambda: opened.module(images[:1])),) * len(images)
    with applied(reduction):
        return tuple(count_macs(call) for call in reduction.without_padding(images))


def routings(opened: LoadedModel, reduction: Reduction, images: Float[Tensor, "B C H W"]) -> tuple[Routing, ...]:
    """Where the tokens of these images went, block by block."""
    with applied(reduction), evaluating(opened.module):
        opened.module(images)
        return tuple(routing.detach() for routing in reduction.routing)


def _call(opened: LoadedModel, reduction: Reduction | None, images: Tensor) -> object:
    with applied(reduction):
        return opened.module(images)


def _kept(opened: LoadedModel, reduction: Reduction | None, images: Tensor) -> float:
    if reduction is None:
        return 0.0
    last = routings(opened, reduction, images)[-1]
    own = last.weights[..., last.prefix :]
    return (own.amax((1, 3)) > 0).sum(1).float().mean().item()


def _judge(
    opened: LoadedModel, reductions: Sequence[Reduction | None], images: Images, batch_size: int, device: torch.device
) -> list[Judgement]:
    """Batch by batch, so that every image is read once."""
    agreements: list[list[Tensor]] = [[] for _ in reductions]
    hits: list[list[Tensor]] = [[] for _ in reductions]
    with tqdm(total=len(images) * len(reductions), desc="judging", unit="image", disable=None, leave=False) as bar:
        for batch, labels in images.batches(batch_size):
            batch, untouched = batch.to(device), None
            for number, reduction in enumerate(reductions):
                with applied(reduction):
                    answer = opened.outputs(batch).float().cpu()
                untouched = answer if untouched is None else untouched
                agreements[number].append(_agreement(untouched, answer, classes=opened.num_classes > 0))
                hits[number].append((answer.argmax(-1) == labels).float())
                bar.update(len(batch))
    return [
        Judgement(torch.cat(same).mean().item(), torch.cat(right).mean().item() if images.labelled else None)
        for same, right in zip(agreements, hits, strict=True)
    ]


def _agreement(untouched: Tensor, answer: Tensor, *, classes: bool) -> Float[Tensor, "B"]:
    if classes:
        return (untouched.argmax(-1) == answer.argmax(-1)).float()
    return F.cosine_similarity(untouched, answer, dim=-1)
