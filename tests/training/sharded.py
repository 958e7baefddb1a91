"""One training with sharded parameters (FSDP2), for `torchrun`: `sharded.py <folder>`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from narrows.training.callbacks import SavePretrained
from tests.training.small import small_data, small_task, small_trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = small_task()
    trainer = small_trainer(
        folder,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        callbacks=[SavePretrained()],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
    )
    trainer.fit(task, small_data(batch_size=4))
    assert all(isinstance(parameter, DTensor) for parameter in task.model.parameters())
    # A process that leaves while threads of its group still run is aborted now and then.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
