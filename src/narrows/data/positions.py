"""Order and random numbers as pure functions of (seed, epoch, position): resuming needs no state of a loader."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class Position:
    """A sample that a sampler requests from a data set.

    Args:
        index: of the sample.
        epoch: in which it is drawn or augmented.
        counts: False for padding that fills up the last batch of a process; its label becomes `IGNORED`.
    """

    index: int
    epoch: int = 0
    counts: bool = True


class PositionSampler(DistributedSampler[Position]):
    """The order of an epoch, distributed over processes.

    Process r of R gets the positions r, r + R, ...: R processes with batches of size b see together what one process
    with batches of size b R sees. Lightning does not replace a `DistributedSampler`.

    Args:
        images: the data set; only its length matters.
        seed: of the order.
        shuffle: a new order for every epoch.
        fill: pad where the samples do not divide evenly by R (else drop the rest).
        num_replicas: R, the number of processes.
        rank: r, of this process.
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
        """Skip the first `position` samples of this process in `epoch`, and in no other."""
        self._begin = Position(position, epoch)
        self.set_epoch(epoch)  # Lightning does so after workers have begun to prepare batches

    def __iter__(self) -> Iterator[Position]:
        order = range(self._length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(self._length, generator=generator).tolist()
        positions = [Position(index, self.epoch) for index in order[: self.total_size]]
        positions += [Position(0, self.epoch, counts=False)] * (self.total_size - len(positions))
        skipped = self._begin.index if self._begin.epoch == self.epoch else 0
        return iter(positions[self.rank :: self.num_replicas][skipped:])


_STEP = np.uint64(0x9E3779B97F4A7C15)


def keys(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of the parts (broadcast): similar parts give unrelated keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + _STEP + np.asarray(part).astype(np.uint64))
    return key


def seed_of(*parts: int) -> int:
    """The hash of the parts as a seed that every generator takes: 63 bits of it."""
    return int(keys(*parts)[0]) >> 1  # Python's: NumPy 1.26 mixes its own uint64 with no int


def uniforms(key: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """`count` uniform numbers in [0, 1) for each of B keys: `[B, count]`, each row a function of its key alone."""
    words = _mix(key[:, None] + _STEP * np.arange(1, -(-count // 2) + 1, dtype=np.uint64))
    halves = words.view(np.uint32)[:, :count] >> np.uint32(8)
    return halves.astype(np.float32) * np.float32(2**-24)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on a counter.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
