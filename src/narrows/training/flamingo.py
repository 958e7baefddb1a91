"""Training what a `Flamingo` adds to its language model, for Lightning's trainer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from narrows.adapters.flamingo import Flamingo
from narrows.adapters.flamingo.host import find_host
from narrows.data import IGNORED
from narrows.data.documents import InterleavedBatch, without_labels
from narrows.demo.reader_parts import digits_language_model, digits_vision_encoder
from narrows.errors import InvalidArgument
from narrows.hub.parts import open_language_model, open_vision_encoder
from narrows.hub.token_rows import TokenRows
from narrows.training.optimisation import parameter_groups
from narrows.training.task import Task
from narrows.validation import check_choice

SCHEDULES = ("constant", "cosine")
DIGITS = "digits"


class FlamingoTraining(Task):
    """Trains the resampler and the gated blocks of a `Flamingo` to predict text with images in it.

    Language model and vision encoder are frozen, in evaluation mode, and not saved with checkpoints. The learning rate
    rises over `warmup_steps` and stays, or falls along a cosine; the resampler has no weight decay (Flamingo, appendix
    B.1.2).

    Logged are `train/loss`, `val/loss`, and whether the images are used: `val/loss_swapped`, the loss when every image
    of a batch stands in the place of another, `val/image_gain`, by how much that is worse, and `gate/<layer>.<part>`,
    the tanh of each gate. The loss alone does not tell: it falls without any image.

    Args:
        language_model: a folder or a hub name of a causal language model; "digits": the small one of the offline job,
            trained if it is not there yet; or a module.
        vision_encoder: a folder with a narrows classifier, or `timm/<model>`; "digits" likewise; or a module.
        flamingo: further arguments of `Flamingo`: `every`, `resampler`, `block`.
        learning_rate: at its highest.
        weight_decay: of AdamW, for the gated blocks; biases, norms and gates do not decay.
        warmup_steps: steps in which the learning rate rises.
        schedule: "constant" or "cosine", after that.
        betas: of AdamW.
        gradient_checkpointing: compute decoder layers again in the backward pass instead of keeping what they made.
        new_tokens: tokens whose rows of the embeddings train too, without weight decay; not with sharded parameters.

    Raises:
        InvalidArgument: a language model or an encoder that is not there, or that cannot be supported.
    """

    def __init__(
        self,
        language_model: str | nn.Module = DIGITS,
        vision_encoder: str | nn.Module = DIGITS,
        *,
        flamingo: Mapping[str, Any] | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        warmup_steps: int = 5000,
        schedule: str = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = False,
        new_tokens: Sequence[str] = (),
    ) -> None:
        check_choice("schedule", schedule, SCHEDULES)
        tokenizer: Any = None
        if isinstance(language_model, str):
            found = digits_language_model() if language_model == DIGITS else language_model
            language_model, tokenizer = open_language_model(found)
        if isinstance(vision_encoder, str):
            vision_encoder = open_vision_encoder(
                digits_vision_encoder() if vision_encoder == DIGITS else vision_encoder
            )
        if gradient_checkpointing:
            find_host(language_model).model.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(
            Flamingo(language_model, vision_encoder=vision_encoder, **(flamingo or {})),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=0.0,
            betas=betas,
        )
        self.save_hyperparameters(ignore=["language_model", "vision_encoder"])
        self.new_tokens = tuple(new_tokens)
        self.token_rows = TokenRows(language_model, tokenizer, new_tokens) if new_tokens else None
        if self.token_rows is not None:
            self.token_rows.train()
        self.tokenizer, self.vision_encoder = tokenizer, vision_encoder
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.strict_loading = False  # what is frozen is not in a checkpoint
        self.loss_right, self.loss_swapped = MeanMetric(), MeanMetric()

    @property
    def flamingo(self) -> Flamingo:
        """What is trained."""
        assert isinstance(self.model, Flamingo)
        return self.model

    def configure_model(self) -> None:
        """Shard the parameters (FSDP2) where the strategy brings a device mesh: each decoder layer, then the rest.

        What is added is sharded with the rest, so that a hook of any decoder layer finds it whole. Each process has the
        vision encoder, small beside a language model, to itself.
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

    def training_step(self, batch: InterleavedBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the tokens that are learned."""
        loss, count = token_losses(self(batch), batch["labels"])
        loss = loss.sum() / count.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(self.gates())
        return loss

    def validation_step(self, batch: InterleavedBatch, batch_idx: int) -> None:
        """Held-out loss, with the right images and with wrong ones."""
        others = swapped(batch["media"], batch["media_mask"])
        for media, metric in ((batch["media"], self.loss_right), (others, self.loss_swapped)):
            loss, count = token_losses(self({**batch, "media": media}), batch["labels"])
            metric.update(loss / count.clamp(min=1), weight=count)

    def on_validation_epoch_end(self) -> None:
        """The losses, and how much worse wrong images are."""
        self._tell("val")

    def test_step(self, batch: InterleavedBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._tell("test")

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
        scheduler = LambdaLR(optimizer, lambda step: rate(step, self.warmup_steps, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen: it is as large as the language model, and does not change."""
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}

    def _tell(self, part: str) -> None:
        right, wrong = self.loss_right.compute(), self.loss_swapped.compute()
        # Every process has computed the same; sync_dist says so to Lightning.
        self.log(f"{part}/loss", right, prog_bar=True, sync_dist=True)
        self.log_dict({f"{part}/loss_swapped": wrong, f"{part}/image_gain": wrong - right}, sync_dist=True)
        self.loss_right.reset()
        self.loss_swapped.reset()


def token_losses(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
    """For each row the sum of the cross-entropies of its labels, each predicted by the token before, and their number.

    A row without labels has 0 of both.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (targets != IGNORED).sum(1)


def swapped(media: Float[Tensor, "B M *medium"], mask: Tensor) -> Float[Tensor, "B M *medium"]:
    """Every real medium in the place of the next one, across rows."""
    places = mask.nonzero(as_tuple=True)
    return media.index_put(places, media[places].roll(1, 0))


def rate(step: int, warmup_steps: int, total_steps: int | None) -> float:
    """The learning rate as a share of its highest: rising, then constant, or a cosine to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
