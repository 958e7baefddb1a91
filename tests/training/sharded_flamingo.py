"""One training of a `Flamingo` with sharded parameters (FSDP2), for `torchrun`: `sharded.py <folder>`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from narrows.training.flamingo import SaveReader
from tests.hub.flamingo_parts import open_gates, small_data, small_task
from tests.training.small import small_trainer
from tests.training.test_flamingo import even


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = open_gates(small_task())
    trainer = small_trainer(
        folder,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        callbacks=[SaveReader()],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
    )
    trainer.fit(task, even(small_data(batch_size=4)))
    for name, parameter in task.flamingo.named_parameters():
        assert isinstance(parameter, DTensor) != name.startswith("vision_encoder."), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
