"""One model under several token reductions, measured side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from narrows.adapters import Reduction
from narrows.costs import Spread, Timing, compare_speed, count_macs, evaluating, peak_memory
from narrows.hub.models import LoadedModel
from narrows.jobs.images import Images
from narrows.jobs.report import carriers_in_use
from narrows.routing import Routing
from narrows.screen import Bar, track

COUNTED = 32
"""Images whose MACs are counted one by one."""


@dataclass(frozen=True)
class Candidate:
    """A model under one token reduction, or untouched. It is reduced only while it runs.

    Args:
        model: the model.
        reduction: the handle, removed from the model; None for the untouched model.
        method: what reduces; "untouched".
        budget: as it was asked for.
    """

    model: LoadedModel
    reduction: Reduction | None = None
    method: str = "untouched"
    budget: str = ""

    @property
    def name(self) -> str:
        """Method and budget: "ats 0.5"."""
        return f"{self.method} {self.budget}".strip()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model is reduced inside, and as it was outside."""
        if self.reduction is None:
            yield
        else:
            with self.reduction.attach():
                yield

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B width"]:
        """Logits or pooled features."""
        with self.applied():
            return self.model.outputs(images)

    def count_macs(self, images: Float[Tensor, "B C H W"]) -> tuple[int, ...]:
        """Multiply-accumulates of each image alone."""
        if self.reduction is None:
            return (count_macs(lambda: self(images[:1])),) * len(images)
        with self.applied():
            return tuple(count_macs(call) for call in self.reduction.without_padding(images))

    def routing(self, images: Float[Tensor, "B C H W"]) -> tuple[Routing, ...]:
        """Where the tokens of these images went, block by block; nothing for the untouched model."""
        if self.reduction is None:
            return ()
        with evaluating(self.model.module):
            self(images)
        return tuple(routing.detach() for routing in self.reduction.routing)

    def count_kept(self, images: Float[Tensor, "B C H W"]) -> float:
        """Tokens beside the prefix that are left at the end, on average; 0 for the untouched model: it drops none."""
        return carriers_in_use(self.routing(images)[-1]).float().mean().item() if self.reduction is not None else 0.0


@dataclass(frozen=True, kw_only=True)
class Trial(Candidate):
    """A candidate, and what it was found to cost and keep.

    Args:
        same: of each image, whether it gets the same class as from the untouched model, 1 or 0; of a model that gives
            features, the cosine between them.
        right: of each image, whether it gets the right class, 1 or 0; None without labels.
        macs: multiply-accumulates of each of the first images, with the tokens really kept.
        kept: as `count_kept` gives it.
        timing: seconds for a batch.
        batch: images in it.
        memory: greatest number of bytes that it has alive beyond weights and images.
    """

    same: Float[Tensor, "N"] = field(repr=False, compare=False)
    right: Float[Tensor, "N"] | None = field(repr=False, compare=False)
    macs: tuple[int, ...]
    kept: float
    timing: Timing
    batch: int
    memory: int

    @property
    def agreement(self) -> float:
        """With the untouched model."""
        return self.same.mean().item()

    @property
    def accuracy(self) -> float | None:
        """The part of the images that get the right class; None without labels."""
        return None if self.right is None else self.right.mean().item()

    @property
    def throughput(self) -> Spread:
        """Images per second."""
        return Spread(tuple(self.batch / seconds for seconds in self.timing.samples))

    @property
    def scores(self) -> Float[Tensor, "N"]:
        """Of each image, what `quality` is the mean of."""
        return self.same if self.right is None else self.right

    @property
    def quality(self) -> float:
        """Accuracy, or where there are no labels agreement."""
        return self.scores.mean().item()


def run_trials(candidates: Sequence[Candidate], images: Images, *, batch_size: int) -> list[Trial]:
    """Every candidate on the same images, speeds taken in turns.

    Args:
        candidates: of one model, untouched the first of them.
        images: to judge by; the first batch of them measures speed and memory.
        batch_size: images in a batch.
    """
    model = candidates[0].model
    first = images.batch(range(min(batch_size, len(images))))[0].to(model.device)
    with evaluating(model.module):
        judgements = _judge(candidates, images, batch_size)
        calls = {candidate.name: partial(candidate, first) for candidate in candidates}
        timings = compare_speed(calls, repeats=7, device=model.device)
        bar = track(candidates, "counting", unit="models")
        return [
            Trial(
                **vars(candidate),
                same=same,
                right=right if images.labelled else None,
                macs=candidate.count_macs(first[:COUNTED]),
                kept=candidate.count_kept(first),
                timing=timings[candidate.name],
                batch=len(first),
                memory=peak_memory(calls[candidate.name], model.device),
            )
            for candidate, (same, right) in zip(bar, judgements, strict=True)
        ]


def _judge(candidates: Sequence[Candidate], images: Images, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """`Trial.same` and `Trial.right` of each; every image is read once."""
    model = candidates[0].model
    agreements: list[list[Tensor]] = [[] for _ in candidates]
    hits: list[list[Tensor]] = [[] for _ in candidates]
    with Bar("judging", len(images) * len(candidates), unit="images", keep=False) as bar:
        for batch, labels in images.batches(batch_size):
            answers = []
            for candidate in candidates:
                answers.append(candidate(batch.to(model.device)).float().cpu())
                bar.advance(len(batch))
            for answer, agreement, hit in zip(answers, agreements, hits, strict=True):
                if model.num_classes:
                    agreement.append((answers[0].argmax(-1) == answer.argmax(-1)).float())
                else:
                    agreement.append(F.cosine_similarity(answers[0], answer, dim=-1))
                hit.append((answer.argmax(-1) == labels).float())
    return [(torch.cat(same), torch.cat(right)) for same, right in zip(agreements, hits, strict=True)]
