"""What runs long does not grow: `python -m tests.soak.growth` trains 10,000 steps and attaches 1,000 times."""

import argparse
import gc
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

import narrows
from narrows.models import create_model
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text
from tests.training.small import SMALL, small_data, small_task, small_trainer

ALLOWED = 2**20
"""Bytes of the process that may be more in the second half than in the first: what an allocator keeps."""


@dataclass(frozen=True)
class State:
    """What there is in a process.

    Args:
        objects: that Python's collector knows.
        tensors: those among them that are tensors.
        threads: that run.
        memory: bytes that are resident.
    """

    objects: int
    tensors: int
    threads: int
    memory: int

    @classmethod
    def now(cls) -> "State":
        """The state after everything that can be collected was."""
        gc.collect()
        objects = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tensors = sum(1 for each in objects if type(each) in (torch.Tensor, nn.Parameter))
        return cls(len(objects), tensors, threading.active_count(), pages * 4096)

    def grown(self, before: "State") -> list[str]:
        """What there is more of than before, in words."""
        found = []
        if self.tensors > before.tensors:
            found.append(f"{self.tensors - before.tensors} more tensors")
        if self.objects > before.objects + 100:  # a cache that fills, a log that is open
            found.append(f"{self.objects - before.objects} more objects")
        if self.threads > before.threads:
            found.append(f"{self.threads - before.threads} more threads")
        if self.memory > before.memory + ALLOWED:
            found.append(f"{(self.memory - before.memory) / 2**20:.1f} MiB more")
        return found


class Watch(Callback):
    """Notes the state at a fifth, at a half and at the end of a training.

    Args:
        steps: how many there are.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.states = steps, dict[int, State]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Note it."""
        if trainer.global_step in (self.steps // 5, self.steps // 2, self.steps):
            self.states[trainer.global_step] = State.now()


def train(steps: int) -> list[str]:
    """What grew from the middle to the end of a training, beyond what grew before the middle."""
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_epochs": -1, "max_steps": steps, "limit_train_batches": 50, "limit_val_batches": 1}
        trainer = small_trainer(Path(folder), callbacks=[watch], enable_checkpointing=False, **options)
        trainer.fit(small_task(), small_data())
    return watch.states[steps].grown(watch.states[steps // 2])


def repeat(what: Callable[[], object], times: int) -> list[str]:
    """What grew from a fifth of the repetitions to their end."""
    for _ in range(times // 5):
        what()
    before = State.now()
    for _ in range(times - times // 5):
        what()
    return State.now().grown(before)


def _hooks(model: nn.Module) -> int:
    parts = list(model.modules())
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


def attach_flamingo(times: int) -> list[str]:
    """A language model is wrapped, read and set free again and again."""
    model, ids, seen = language_model("llama"), text("a#bc#d"), media(1, 2)
    before = _hooks(model)

    def once() -> None:
        made = flamingo(model)
        with torch.no_grad():
            made(ids, media=seen)
        made.remove()

    grown = repeat(once, times)
    return grown + (["more hooks"] if _hooks(model) > before else [])


def reduce_tokens(times: int) -> list[str]:
    """The tokens of a model are reduced and restored again and again."""
    model, images = create_model("vit_mini", **SMALL).eval(), torch.randn(1, 1, 16, 16)
    before = _hooks(model)

    @torch.no_grad()
    def once() -> None:
        with narrows.reduce_tokens(model, method="topk", budget=0.5):
            model(images)

    grown = repeat(once, times)
    return grown + (["more hooks"] if _hooks(model) > before else [])


def main() -> int:
    """Do all of it and print a row for each; 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=1_000)
    asked = parser.parse_args()
    failed = 0
    for name, count, what in (
        ("training steps", asked.steps, train),
        ("times Flamingo attached and removed", asked.times, attach_flamingo),
        ("times tokens reduced and restored", asked.times, reduce_tokens),
    ):
        grown = what(count)
        failed += bool(grown)
        print(f"{count:,} {name}: {', '.join(grown) or 'nothing grew'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
