"""Which image comes when: a pure function of (seed, epoch, position), so that resuming needs no state of a loader."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class Position:
    """What a sampler asks of a data set.

    Args:
        index: of the image.
        epoch: the image is drawn or augmented for.
        counts: False for the images that only fill up the last batch of a process; their label becomes `IGNORED`.
    """

    index: int
    epoch: int = 0
    counts: bool = True


class PositionSampler(DistributedSampler[Position]):
    """The order of an epoch, dealt out to processes like cards.

    Process r of R gets the positions r, r + R, ...: batches of size b in R processes hold together the images that
    one process with batches of size b R would see. Lightning leaves samplers of this base class alone.

    Args:
        images: the data set; only its length matters.
        seed: of the order.
        shuffle: draw a new order for every epoch.
        fill: where the images do not divide evenly, fill up with images that do not count (else drop the rest).
        num_replicas: R, the number of processes.
        rank: r, which of them this is.
    """

    def __init__(
        self, images: Sized, *, seed: int = 0, shuffle: bool, fill: bool, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(
            images,  # pyright: ignore[reportArgumentType]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=not fill,
        )
        self._length = len(images)
        self._begin = Position(0)

    def begin_at(self, epoch: int, position: int) -> None:
        """Skip the first `position` images of this process in `epoch`; other epochs are complete."""
        self._begin = Position(position, epoch)

    def __iter__(self) -> Iterator[Position]:
        order = range(self._length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(int(keys(self.seed, self.epoch)[0] >> 1))
            order = torch.randperm(self._length, generator=generator).tolist()
        positions = [Position(index, self.epoch) for index in order[: self.total_size]]
        positions += [Position(0, self.epoch, counts=False)] * (self.total_size - len(positions))
        skipped = self._begin.index if self._begin.epoch == self.epoch else 0
        return iter(positions[self.rank :: self.num_replicas][skipped:])


_STEP = np.uint64(0x9E3779B97F4A7C15)


def keys(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One key for each combination of the parts (broadcast): close parts give unrelated keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + _STEP + np.asarray(part).astype(np.uint64))
    return key


def uniforms(key: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """`count` uniform numbers in [0, 1) for each of B keys: `[B, count]`, the same whichever other keys are asked."""
    words = _mix(key[:, None] + _STEP * np.arange(1, -(-count // 2) + 1, dtype=np.uint64))
    halves = words.view(np.uint32)[:, :count] >> np.uint32(8)
    return halves.astype(np.float32) * np.float32(2**-24)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on a counter.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
