"""Training what a `Flamingo` adds to its language model, for Lightning's trainer."""

import inspect
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from narrows.adapters.flamingo import Flamingo
from narrows.adapters.flamingo.host import find_host
from narrows.data import IGNORED
from narrows.data.document_module import InterleavedDataModule
from narrows.data.documents import InterleavedBatch, without_labels
from narrows.errors import InvalidArgument
from narrows.hub.readers import Reader, ReaderFormat, TokenRows
from narrows.training.task import Task, about_run, parameter_groups, warmup_schedule
from narrows.validation import check_choice, check_not_negative

log = logging.getLogger(__name__)

SCHEDULES = ("constant", "cosine")
LOOKS, GAIN = 3, 0.02
"""After so many looks in a row at which wrong images were worse by less than this share of the loss, `fit` warns."""


class FlamingoTraining(Task):
    """Trains the resampler and the gated blocks of a `Flamingo` to predict text with images in it.

    Language model and vision encoder stay frozen, in evaluation mode, and are not saved with checkpoints. The learning
    rate rises over `warmup_steps` and stays, or falls to 0 along a cosine; the resampler has no weight decay (Flamingo,
    appendix B.1.2).

    Logged are `train/loss`, `val/loss`, and whether the images are used: `val/loss_swapped`, the loss when every image
    of a batch is replaced by another, `val/image_gain`, by how much that is worse, and `gate/<layer>.<part>`,
    the tanh of each gate. The loss alone does not tell: it falls without any image. `train/image_gain` is the same for
    a batch every `look_every` steps; where it stays at 0 after the warm-up, a warning says what to try.

    The loss is that of what the data give labels to: in conversations, of the answers
    (`InterleavedDataModule.rest_weight`). Logits are computed at those places only.

    Args:
        flamingo: a frozen language model with its vision encoder and what reads it.
        tokenizer: of the language model; the data take it from here.
        learning_rate: the peak learning rate.
        weight_decay: of AdamW, for the gated blocks; biases, norms and gates do not decay.
        warmup_steps: steps in which the learning rate rises.
        schedule: "constant" or "cosine", after that.
        betas: of AdamW.
        gradient_checkpointing: compute decoder layers again in the backward pass instead of keeping their activations.
        new_tokens: tokens whose rows of the embeddings train too, without weight decay; not with sharded parameters.
        look_every: steps between two looks at whether the images are used; 0: none. Each costs a forward pass.

    Raises:
        InvalidArgument: another schedule, a token that the tokenizer does not have, a `Flamingo` without an encoder.
    """

    def __init__(
        self,
        flamingo: Flamingo,
        tokenizer: Any,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        warmup_steps: int = 5000,
        schedule: str = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = False,
        new_tokens: Sequence[str] = (),
        look_every: int = 100,
    ) -> None:
        check_choice("schedule", schedule, SCHEDULES)
        check_not_negative(look_every=look_every)
        if flamingo.vision_encoder is None:
            raise InvalidArgument("flamingo", expected="one with a vision encoder", got="one that reads encoded media")
        super().__init__(flamingo, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas)
        self.save_hyperparameters(ignore=["flamingo", "tokenizer"])
        if gradient_checkpointing:
            find_host(flamingo.language_model).model.gradient_checkpointing_enable({"use_reentrant": False})
        self.new_tokens = tuple(new_tokens)
        self.token_rows = TokenRows(flamingo.language_model, tokenizer, new_tokens) if new_tokens else None
        if self.token_rows is not None:
            self.token_rows.train()
        self.tokenizer, self.warmup_steps, self.schedule = tokenizer, warmup_steps, schedule
        self.strict_loading = False  # what is frozen is not in a checkpoint
        self.loss_right, self.loss_swapped = MeanMetric(), MeanMetric()
        self.loss_compared = MeanMetric()  # with the right images, where there were others to compare with
        self._other_image: Tensor | None = None
        self.look_every, self._gains = look_every, list[float]()
        self._keeps = "logits_to_keep" in inspect.signature(find_host(flamingo.language_model).model.forward).parameters

    @property
    def flamingo(self) -> Flamingo:
        """What is trained."""
        assert isinstance(self.model, Flamingo)
        return self.model

    @property
    def vision_encoder(self) -> nn.Module:
        """What encodes the images; the data take their size from it."""
        assert self.flamingo.vision_encoder is not None
        return self.flamingo.vision_encoder

    def configure_model(self) -> None:
        """Shard the parameters (FSDP2) where the strategy brings a device mesh: each decoder layer, then the rest.

        What is added is sharded with the rest, so that a hook of any decoder layer finds it whole. The vision encoder,
        small beside a language model, is not sharded.
        """
        if self.device_mesh is None:
            return
        if self.new_tokens:
            raise InvalidArgument("new_tokens", expected="none with sharded parameters", got=self.new_tokens)
        mesh = self.device_mesh["data_parallel"]
        for layer in find_host(self.flamingo.language_model).layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.flamingo, mesh=mesh, ignored_params=set(self.vision_encoder.parameters()))

    def forward(self, batch: InterleavedBatch) -> Float[Tensor, "B T V"]:
        """Logits of the next token."""
        return self.model(**without_labels(batch)).logits

    def losses(self, batch: InterleavedBatch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """For each document the sum of its weighted cross-entropies, and that of the weights."""
        targets = batch["labels"][:, 1:]
        weights = batch["weights"][:, 1:] if "weights" in batch else (targets != IGNORED).float()
        if not self._keeps:
            return token_losses(self(batch)[:, :-1], targets, weights)
        # The head of a language model is as wide as its vocabulary, and most of a conversation has no label.
        places = (targets != IGNORED).any(0).nonzero()[:, 0]
        logits = self.model(**without_labels(batch), logits_to_keep=places).logits
        return token_losses(logits, targets[:, places], weights[:, places])

    def training_step(self, batch: InterleavedBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the tokens that are learned."""
        losses, weights = self.losses(batch)
        loss = losses.sum() / weights.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(self.gates())
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.look_every and first and self.global_step and self.global_step % self.look_every == 0:
            self._look(batch, loss.detach())
        return loss

    def _look(self, batch: InterleavedBatch, right: Tensor) -> None:
        """Log by how much wrong images are worse, and warn where they have not been for long."""
        with torch.no_grad():
            losses, weights = self.losses({**batch, "media": swapped(batch["media"], batch["media_mask"])})
        gain = losses.sum() / weights.sum().clamp(min=1) - right
        self.log("train/image_gain", gain)
        if self.global_step < self.warmup_steps or int(batch["media_mask"].sum()) < 2:
            return
        self._gains.append((gain / right.clamp(min=1e-6)).item())
        if len(self._gains) == LOOKS and max(self._gains) < GAIN and self.global_rank == 0:
            log.warning(
                "After %d steps the images are not used: the loss of the answers is %.3f with the right images and "
                "%.3f with others, as good as chance. What to try: gates that start open (--model.flamingo.block "
                "'{gate_init: 0.4}'), a higher learning rate (2e-3 where few steps are run), the loss on the words "
                "that need the image (conversations, --data.rest_weight 0), blocks at earlier layers, an encoder whose "
                "tokens hold what is asked.",
                self.global_step,
                right,
                right + gain,
            )
        elif max(self._gains) >= GAIN:
            self._gains.clear()

    def validation_step(self, batch: InterleavedBatch, batch_idx: int) -> None:
        """Held-out loss, with the right images and with wrong ones."""
        losses, weights = self.losses(batch)
        self.loss_right.update(losses / weights.clamp(min=1), weight=weights)
        real = batch["media"][batch["media_mask"]]
        if len(real) != 1 or self._other_image is not None:
            others = swapped(batch["media"], batch["media_mask"], self._other_image)
            worse, _ = self.losses({**batch, "media": others})
            self.loss_compared.update(losses / weights.clamp(min=1), weight=weights)
            self.loss_swapped.update(worse / weights.clamp(min=1), weight=weights)
        self._other_image = real[-1] if len(real) else self._other_image

    def on_validation_epoch_end(self) -> None:
        """The losses, and how much worse wrong images are."""
        super().on_validation_epoch_end()
        self._log_losses("val")

    def test_step(self, batch: InterleavedBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_losses("test")

    def gates(self) -> dict[str, Tensor]:
        """The tanh of each gate, by the number of its decoder layer."""
        return {
            f"gate/{layer}.{part}": _whole(getattr(block, f"{part}_gate").detach()).tanh().mean()
            for layer, block in zip(self.flamingo.layer_numbers, self.flamingo.blocks, strict=True)
            for part in ("attn", "ff")
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW for what was added, with a learning rate that changes with every step."""
        resampler = {"params": list(self.flamingo.resampler.parameters()), "weight_decay": 0.0}
        groups = [*parameter_groups(self.flamingo.blocks, self.weight_decay), resampler]
        if self.token_rows is not None:
            groups.append({"params": self.token_rows.weights, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches) if self.schedule == "cosine" else None
        schedule = warmup_schedule(optimizer, warmup_steps=self.warmup_steps, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen parameters out: they are as large as the language model, and do not change."""
        super().on_save_checkpoint(checkpoint)
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}

    def _log_losses(self, part: str) -> None:
        right, compared, wrong = (
            metric.compute() for metric in (self.loss_right, self.loss_compared, self.loss_swapped)
        )
        # Metrics are synchronised already; without sync_dist Lightning would warn.
        self.log(f"{part}/loss", right, prog_bar=True, sync_dist=True)
        self.log_dict({f"{part}/loss_swapped": wrong, f"{part}/image_gain": wrong - compared}, sync_dist=True)
        self.loss_right.reset()
        self.loss_swapped.reset()
        self.loss_compared.reset()
        self._other_image = None


class SaveReader(Callback):
    """Writes what was trained into `<run>/model`, from the best checkpoint; `narrows generate --checkpoint` takes it.

    It is the last state where nothing says which is best, or where checkpoints are sharded.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        assert isinstance(pl_module, FlamingoTraining)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, InterleavedDataModule)
        folder = trainer.log_dir  # log_dir is broadcast: every process has to read it
        if folder is None:
            return
        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if best.is_file():
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(weights, strict=False)
        (example,) = data.loaded.train.documents([0])
        prompts = ReaderFormat(
            data.image_token,
            data.end_of_chunk,
            new_tokens=pl_module.new_tokens,
            chat=bool(example.messages),
            system="".join(message.content for message in example.messages[:1] if message.role == "system"),
        )
        reader = Reader(pl_module.flamingo, pl_module.tokenizer, prompts)
        # Every process has to save, since shards are gathered; only the first one's files are kept.
        with tempfile.TemporaryDirectory() as elsewhere:
            target = Path(folder) / "model" if trainer.is_global_zero else elsewhere
            reader.save(target, about=about_run(trainer, best=best.is_file()))


def token_losses(
    logits: Float[Tensor, "B K V"], targets: Int[Tensor, "B K"], weights: Float[Tensor, "B K"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """For each row the sum of the weighted cross-entropies of its targets, and that of the weights.

    A row whose targets are all `IGNORED` has 0 of both.
    """
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
    weights = weights.masked_fill(targets == IGNORED, 0.0)
    return (losses * weights).sum(1), weights.sum(1)


def swapped(
    media: Float[Tensor, "B M *medium"], mask: Tensor, other: Tensor | None = None
) -> Float[Tensor, "B M *medium"]:
    """The media, each real one replaced by the real one before it, across rows; one alone by `other`."""
    places = mask.nonzero(as_tuple=True)
    real = media[places]
    return media.index_put(places, other[None] if len(real) == 1 and other is not None else real.roll(1, 0))


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
