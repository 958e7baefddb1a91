"""What every task shares: a model, how it is optimised, how it is spread over devices."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from narrows.data.module import PositionedDataModule
from narrows.data.positions import keys
from narrows.errors import Diverged, InvalidArgument
from narrows.training import resume
from narrows.training.by_sample import DrawnBySample
from narrows.validation import check_not_negative, check_share

LOOK_EVERY = 20
"""Steps after which a loss that is no number is noticed on a GPU, and where there are several processes."""


def data_of(data: Any, kind: str = "images") -> dict[str, str]:
    """What a model card says of data with `name`, `train` and `held_out`, whose samples are called `kind`."""
    name = Path(data.name).name  # where a folder stands is nobody's affair
    return {"Data": f"{name}: {len(data.train):,} training and {len(data.held_out):,} held-out {kind}"}


def about_run(trainer: Trainer, *, best: bool) -> dict[str, str]:
    """What a model card says of a run: data, length, and what the saved model reaches on held-out samples.

    Args:
        trainer: after its run.
        best: whether the best checkpoint is saved, and not the last state.
    """
    checkpoints: Any = trainer.checkpoint_callback
    if best and checkpoints.best_model_score is not None:
        found = {checkpoints.monitor: checkpoints.best_model_score}
    else:
        found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    figures = {
        f"Held-out {name.removeprefix('val/').replace('_', ' ')}": f"{float(value):.4g}"
        for name, value in found.items()
    }
    data: Any = getattr(trainer, "datamodule", None)
    known = data_of(data.loaded, data.kind) if isinstance(data, PositionedDataModule) else {}
    return {**known, "Training": f"{trainer.global_step:,} steps", **figures}


class Task(LightningModule):
    """Base class: trains `model` with AdamW; the learning rate warms up linearly and falls to 0 along a cosine.

    What is drawn at random in a step is a pure function of the seed and the step, so that a resumed run draws what the
    unbroken one would have drawn. Initial slots, Gumbel noise and stochastic depth are drawn for each sample alone
    (`DrawnBySample`), so that several processes draw what one does; dropout and mixing for each process. Evaluation
    draws the same in every epoch. A subclass implements the steps of Lightning.

    Args:
        model: what is trained.
        learning_rate: the peak learning rate.
        weight_decay: of AdamW; biases, norms and what the model names in `no_weight_decay()` do not decay.
        warmup: share of all steps in which the learning rate rises.
        betas: of AdamW. 0.999 averages squared gradients over as many steps as a short run has.
        ema: decay of a running average of the weights, 0.999 say: the average is what is validated and saved. None
            averages nothing.

    Raises:
        InvalidArgument: a learning rate, weight decay, warmup, betas or ema out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        ema: float | None = None,
    ) -> None:
        super().__init__()
        check_learning_rate(learning_rate)
        check_not_negative(weight_decay=weight_decay)
        check_share(warmup=warmup)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise InvalidArgument("betas", expected="two numbers of at least 0 and below 1", got=betas)
        if ema is not None and not 0 < ema < 1:
            raise InvalidArgument("ema", expected="None or a decay between 0 and 1, 0.999 say", got=ema)
        self.model, self.ema = model, ema
        self.learning_rate, self.weight_decay, self.warmup, self.betas = learning_rate, weight_decay, warmup, betas
        self.classes: tuple[str, ...] = ()
        self._drawn = DrawnBySample(nn.Module())
        self._seed: int | None = None
        self._validated: tuple[int, int] | None = None
        self._changing: int | None = None
        self._lost: Tensor | None = None

    def on_fit_start(self) -> None:
        """Keep the seed of the run: `on_train_batch_start` replaces torch's in every step."""
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        """Go on where the checkpoint was written."""
        self._lost = None
        resume.begin(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of this step; of each of its batches, where gradients are accumulated."""
        assert self._seed is not None
        part = batch_idx % self.trainer.accumulate_grad_batches
        seed = int(keys(self._seed, self.global_step, self.global_rank, *([part] if part else []))[0])
        if self.device.type == "cpu":
            # Without a GPU, `torch.manual_seed` keeps every call and its stack, to repeat it once CUDA is initialised.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        self._begin_drawing(batch, (self._seed, 0, self.trainer.current_epoch, batch_idx))

    def setup(self, stage: str) -> None:
        """Draw random numbers of the model sample by sample, and learn what the classes are called.

        Raises:
            InvalidArgument: classes of the data that are not those the model was trained on.
        """
        self._drawn = DrawnBySample(self.model)
        data: Any = self.trainer.datamodule if self.trainer.datamodule and stage != "predict" else None  # pyright: ignore[reportAttributeAccessIssue]
        found = tuple(getattr(getattr(data, "loaded", None), "classes", ()))
        if stage == "fit" or not self.classes:
            self.classes = found or self.classes
        else:
            check_classes(self.classes, found)

    def teardown(self, stage: str) -> None:
        """Leave the model as it was."""
        self._drawn.remove()

    def configure_callbacks(self) -> Sequence[Callback]:
        """One that leaves the model as it was after an exception too, when nothing is torn down; the average."""
        callbacks: list[Callback] = [LambdaCallback(on_exception=lambda *_: self._drawn.remove())]
        if self.ema is not None and self.trainer.state.fn == "fit":
            callbacks.append(AveragedWeights(self.ema))
        return callbacks

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Draw what the model draws for these samples: the same in every validation."""
        self._begin_drawing(batch, (0, 1, dataloader_idx, batch_idx))

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _begin_drawing(self, batch: Any, key: Sequence[int]) -> None:
        samples = next((part for part in (batch.values() if isinstance(batch, Mapping) else batch)), None)
        if isinstance(samples, Tensor):
            trainer = self.trainer
            self._drawn.begin(key, len(samples), process=trainer.global_rank, processes=trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note that parameters change now: until the batch is done, a checkpoint would hold half a step."""
        loop: Any = self.trainer.fit_loop
        self._changing = loop.epoch_loop.batch_progress.total.processed

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where the loss is no number: at once on one CPU, elsewhere every few steps, since to look is to wait.

        Raises:
            Diverged: it is not.
        """
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        bad = ~torch.isfinite(loss.detach())
        self._lost = bad if self._lost is None else self._lost | bad
        everywhere = self.device.type == "cpu" and self.trainer.world_size == 1
        if everywhere or (batch_idx + 1) % LOOK_EVERY == 0:
            self._stop_if_diverged(bool(self._lost), "the loss is no finite number")

    def on_train_end(self) -> None:
        """Stop where parameters are no numbers any more.

        Raises:
            Diverged: they are not.
        """
        self._check_parameters()

    def on_fit_end(self) -> None:
        """The next run has a seed of its own."""
        self._seed = None

    def on_validation_epoch_end(self) -> None:
        """Remember that this place was validated."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            loop: Any = self.trainer.fit_loop
            self._validated = (loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.processed)

    @property
    def place(self) -> resume.Place:
        """How far the run is."""
        return resume.place(self.trainer, self._validated)

    @property
    def is_between_steps(self) -> bool:
        """Whether parameters and optimizer are as a whole number of steps leaves them."""
        loop: Any = self.trainer.fit_loop
        return self._changing != loop.epoch_loop.batch_progress.total.processed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write where the run is, so that it is resumed exactly, by a run whose checkpoints are as exact.

        Raises:
            Diverged: parameters are no numbers any more; the checkpoint of before stays.
        """
        self._check_parameters()
        if self.trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        where = self.place
        resume.write(where, checkpoint["loops"]["fit_loop"])
        checkpoint["narrows"] = {"seed": self._seed, "classes": list(self.classes)}
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if (state := checkpoint.get(type(data).__qualname__)) and {"epoch", "images"} <= state.keys():
            samples = 0 if where.is_end else where.batches * data.batch_size
            state.update(epoch=where.epoch + int(where.is_end), images=samples)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed that the run began with.

        Raises:
            InvalidArgument: the weights of another model, or of other classes than those of the data.
        """
        ours = checkpoint.get("narrows", {})
        self._seed = ours.get("seed")
        check_classes(ours.get("classes", ()), self.classes)
        self.classes = tuple(ours.get("classes", ())) or self.classes
        found, expected = checkpoint.get("state_dict", {}), self.state_dict()
        wrong = [name for name in found if name not in expected or found[name].shape != expected[name].shape]
        if self.strict_loading and found:
            wrong += [name for name in expected if name not in found]
        if wrong:
            raise InvalidArgument(
                "checkpoint",
                expected="a checkpoint of this model",
                got=f"one with other {', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}",
                hint="Another number of classes or another size of images makes another model.",
            )

    def _check_parameters(self) -> None:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.parameters() if p.requires_grad)
        finite = all(bool(torch.isfinite(parameter.detach()).all()) for parameter in local)
        self._stop_if_diverged(not finite, "parameters are no finite numbers any more")

    def _stop_if_diverged(self, bad: bool, what: str) -> None:
        """In all processes, whichever of them noticed."""
        if self.trainer.strategy.reduce_boolean_decision(bad, all=False):
            raise Diverged(
                f"The training diverged: after {self.global_step} steps {what}. It was stopped, and this state is not "
                "saved. Lower the learning rate, warm up for longer, or clip gradients."
            )

    def configure_model(self) -> None:
        """Shard the parameters (FSDP2) where the strategy brings a device mesh: block by block, then the rest."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        stacks = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "blocks"]
        for block in [block for stack in stacks for block in stack.children()]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate that changes with every step."""
        groups = parameter_groups(self.model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_schedule(optimizer, warmup_steps=max(1, round(self.warmup * steps)), total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AveragedWeights(EMAWeightAveraging):
    """A running average of the weights, which is validated, saved and left in the model; resuming is exact.

    A run may be stopped between a step and its average, or in a validation, while the average is in the model's place:
    both are put right before a checkpoint is written.

    Args:
        decay: of the average with every step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay, use_buffers=False)
        self._decay, self._swapped = decay, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with the weights as they are.

        Raises:
            InvalidArgument: parameters that are sharded over devices.
        """
        if pl_module.device_mesh is not None:
            raise InvalidArgument("ema", expected="None where parameters are sharded", got=self._decay)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*WeightAveraging")  # that shards would not be averaged
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the average where the model is."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave model and average as whole steps leave them."""
        assert isinstance(pl_module, Task)
        if self._swapped:
            self._swap_models(pl_module)
        elif self._average_model is not None and pl_module.is_between_steps:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped


def check_learning_rate(learning_rate: float) -> None:
    """Raise unless it is a positive finite number."""
    if not 0 < learning_rate < math.inf:
        raise InvalidArgument("learning_rate", expected="a positive finite number", got=learning_rate)


def check_classes(trained: Sequence[str], found: Sequence[str]) -> None:
    """Raise if data have other classes than those a model was trained on: labels would mean something else.

    Raises:
        InvalidArgument: names the classes of both that the other one does not have.
    """
    if not trained or not found or tuple(trained) == tuple(found):
        return
    gone, new = ([name for name in one if name not in other] for one, other in ((trained, found), (found, trained)))
    if not gone and not new:  # the same names in another order
        gone, new = list(trained), list(found)
    raise InvalidArgument(
        "data",
        expected=f"the {len(trained)} classes that the model was trained on{_named(gone)}",
        got=f"{len(found)} classes{_named(new)}",
        hint="Rename the folders of classes as they were, or train another model.",
    )


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4])) + (" and more" if len(names) > 4 else "")
    return f", {shown} among them" if names else ""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not: biases, norms, and what `model.no_weight_decay()` names."""
    exempt: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # pyright: ignore
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2].endswith("bias")
        (kept if parameter.ndim <= 1 or is_bias or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_schedule(optimizer: Optimizer, *, warmup_steps: int, total_steps: int | None = None) -> LambdaLR:
    """The learning rate rises linearly over `warmup_steps`, then stays, or falls along a cosine, 0 at `total_steps`.

    It is a function of the step alone. torch's `SequentialLR` of `LinearLR` and `CosineAnnealingLR` gives the same, but
    restores the length of the run that was saved: a run that goes on for longer would end at the peak learning rate.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if total_steps is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    return LambdaLR(optimizer, factor)
