"""What every data module shares: an order that is a pure function of (seed, epoch, position), and exact resume."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from narrows.data.positions import PositionSampler
from narrows.errors import DataError
from narrows.validation import check_positive


class PositionedDataModule(LightningDataModule):
    """Base class of data modules whose sets are asked for positions (`PositionSampler`).

    A checkpoint taken in the middle of an epoch goes on with the very next sample.

    Args:
        batch_size: samples in a batch of one process.
        num_workers: processes that prepare samples; 0 prepares them in the training process.
        seed: of the order.
        collate: what makes a batch of what the set returns for a list of positions.
    """

    def __init__(
        self, *, batch_size: int, num_workers: int, seed: int, collate: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.collate = collate or _as_it_is
        self._resumed: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """How far the epoch has come."""
        if self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        finished = done >= self.trainer.num_training_batches
        return {
            "epoch": self.trainer.current_epoch + int(finished),
            "images": 0 if finished else done * self.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._resumed = state_dict

    def in_new_order(self, samples: Any, name: str, kind: str = "images") -> DataLoader[Any]:
        """Full batches of an epoch's samples in an order of their own; errors call them `kind` of `name`.

        Raises:
            DataError: fewer samples than a batch.
        """
        sampler = PositionSampler(samples, seed=self.seed, shuffle=True, fill=False, **self._processes)
        if len(sampler) < self.batch_size:
            raise DataError(
                f"{name} has {len(samples)} training {kind}, {len(sampler)} for each process: fewer than "
                f"batch_size = {self.batch_size}. Lower batch_size or add {kind}."
            )
        if self._resumed:
            sampler.begin_at(self._resumed["epoch"], self._resumed["images"])
            self._resumed = {}
        return self._loader(samples, sampler, drop_last=True)

    def in_order(self, samples: Any) -> DataLoader[Any]:
        """All samples one after another."""
        return self._loader(samples, PositionSampler(samples, shuffle=False, fill=True, **self._processes))

    @property
    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            return {}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def _loader(self, samples: Dataset[Any], sampler: PositionSampler, *, drop_last: bool = False) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


def _as_it_is(batch: Any) -> Any:
    """`ImageSet` returns whole batches."""
    return batch
