"""Object discovery for Lightning's trainer: reconstruction, scores of what was found, and signs of collapse."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from narrows.data import IGNORED
from narrows.errors import InvalidArgument
from narrows.metrics import FGARI, MBO
from narrows.models import ObjectDiscovery, ObjectDiscoveryOutput
from narrows.ops.object_hints import object_hints
from narrows.ops.temporal_losses import feature_transitions, slot_contrast_loss, temporal_similarity_loss
from narrows.precision import at_least_float32
from narrows.training.task import Task
from narrows.validation import check_not_negative

Batch = Sequence[Tensor]
MASKS = ("decoder", "attention")

log = logging.getLogger("narrows")


class ObjectTask(Task):
    """Trains a model that finds objects, with the error of its reconstruction, and scores it where masks are known.

    The loss is a weighted sum: of the reconstruction's error; in clips, of the contrast of slots between frames and of
    the similarity of features between frames, which a decoder with transitions predicts; of the share of slots that a
    gate keeps; and of how far preheated slots were from those that came out.

    Logged are `train/loss`, `val/loss`, and of the masks of decoder and attention `val/fg_ari`, `val/mbo`,
    `val/attention_fg_ari`, `val/attention_mbo`; the same of `test`. A clip is scored as one sample. Scores are not
    logged where no pixel has a label. What `state_of` finds is logged as `train/slots_used`, `train/entropy`,
    `train/similarity`, and `train/gradient_norm`, before gradients are clipped; signs of collapse are named in the log
    after each epoch, with what to try.

    Args:
        model: maps images to `ObjectDiscoveryOutput`.
        reconstruction: weight of the reconstruction's error. VideoSAUR on MOVi does without, by 0.
        contrast: weight of the contrast between slots of one frame and the next in clips (SlotContrast: 0.5).
        contrast_temperature: divides the cosines of slots.
        similarity: weight of the cross entropy between where cells go in the next frame by their features, and what the
            decoder predicts (VideoSAUR: 0.1). It needs a decoder with `transitions`.
        similarity_temperature: divides the cosines of features (VideoSAUR: 0.075 on MOVi, 0.25 on YouTube-VIS).
        sparsity: weight of the share of slots that are kept, of models with `adaptive=True` (AdaSlot: 0.1).
        distillation: weight of the mean square error of guessed slots, of models with `preheated=True` (SmoothSA: 100).
        options: those of `Task`; by default no weight decay and a peak learning rate of 1e-3.
    """

    def __init__(
        self,
        model: ObjectDiscovery,
        *,
        reconstruction: float = 1.0,
        contrast: float = 0.0,
        contrast_temperature: float = 0.1,
        similarity: float = 0.0,
        similarity_temperature: float = 0.075,
        sparsity: float = 0.0,
        distillation: float = 100.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.06,
        betas: tuple[float, float] = (0.9, 0.999),
        ema: float | None = None,
    ) -> None:
        weights = {"reconstruction": reconstruction, "contrast": contrast, "similarity": similarity}
        check_not_negative(**weights, sparsity=sparsity, distillation=distillation)
        if not any(weights.values()):
            raise InvalidArgument("reconstruction", expected="a weight above 0, of this or another loss", got=0)
        temperatures = {
            "contrast_temperature": contrast_temperature,
            "similarity_temperature": similarity_temperature,
        }
        for name, value in temperatures.items():
            if not 0 < value < math.inf:
                raise InvalidArgument(name, expected="a positive number", got=value)
        if similarity and not getattr(getattr(model, "decoder", None), "transitions", False):
            raise InvalidArgument(
                "similarity",
                expected="0: the decoder predicts no transitions",
                got=similarity,
                hint='Build it with "transitions": true; "mlp" and "mixer" can.',
            )
        if sparsity and getattr(model, "gate", None) is None:
            expected = "0: the model drops no slots"
            raise InvalidArgument("sparsity", expected=expected, got=sparsity, hint="Build it with adaptive=True.")
        optimised = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup, "betas": betas}
        super().__init__(model, **optimised, ema=ema)
        self.save_hyperparameters(ignore=["model"])
        self.weights = {**weights, "sparsity": sparsity, "distillation": distillation}
        self.contrast_temperature, self.similarity_temperature = contrast_temperature, similarity_temperature
        parts = ("val", "test")
        self.losses = torch.nn.ModuleDict({part: MeanMetric() for part in parts})
        self.scores = torch.nn.ModuleDict(
            {f"{part}_{masks}_{name}": kind() for part in parts for masks in MASKS for name, kind in _METRICS.items()}
        )

    def setup(self, stage: str) -> None:
        """Check that there are masks where they are needed: for hints, and for scores that a callback watches.

        Raises:
            InvalidArgument: there are none.
        """
        super().setup(stage)
        trainer: Any = self.trainer
        images = getattr(getattr(trainer, "datamodule", None), "loaded", None)
        if images is None or getattr(images.train, "has_masks", True):
            return
        if getattr(self.model, "hints", None) is not None:
            raise _without_masks(self.model)  # pyright: ignore[reportArgumentType]
        watched = [getattr(callback, "monitor", None) or "" for callback in trainer.callbacks]
        scores = [name for name in watched if name.rpartition("/")[2].removeprefix("attention_") in _METRICS]
        if scores and stage == "fit":
            expected = f"val/loss: {images.name} has no masks to score with"
            raise InvalidArgument("monitor", expected=expected, got=repr(scores[0]))

    def forward(self, images: Tensor) -> ObjectDiscoveryOutput:
        """Objects of images or clips."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses that are asked for."""
        images, truth = batch
        found = find(self.model, images, truth)  # pyright: ignore[reportArgumentType]
        losses = self._losses(found)
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        self.log("train/loss", loss, prog_bar=True)
        if self._logs:
            for name, value in losses.items() if len(losses) > 1 else ():
                self.log(f"train/{name}", value)
            for name, value in state_of(found)._asdict().items():
                self.log(f"train/{name}", value)
        return loss

    def _losses(self, found: ObjectDiscoveryOutput) -> dict[str, Tensor]:
        """Each loss that has a weight, before it is weighted."""
        losses: dict[str, Tensor] = {}
        for name in ("contrast", "similarity"):
            if self.weights[name] and (found.slots.ndim != 4 or found.slots.shape[1] < 2):
                got = f"slots of shape {tuple(found.slots.shape)}"
                raise InvalidArgument(name, expected="0 for images: it compares frames of clips", got=got)
        if self.weights["reconstruction"]:
            losses["reconstruction"] = found.loss
        if self.weights["contrast"]:
            losses["contrast"] = slot_contrast_loss(found.slots, temperature=self.contrast_temperature)
        if self.weights["similarity"]:
            losses["similarity"] = self._similarity(found)
        if self.weights["sparsity"] and found.kept is not None:
            losses["sparsity"] = found.kept.mean()
        if self.weights["distillation"] and found.guess is not None:
            first = found.slots if found.slots.ndim == 3 else found.slots[:, 0]
            losses["distillation"] = F.mse_loss(found.guess, first.detach())
        return losses

    def _similarity(self, found: ObjectDiscoveryOutput) -> Tensor:
        assert found.transitions is not None
        features = found.target.flatten(3).mT
        where = feature_transitions(features, temperature=self.similarity_temperature)
        return temporal_similarity_loss(found.transitions[:, :-1], where)

    @property
    def _logs(self) -> bool:
        trainer: Any = self.trainer
        return self.global_step % trainer.log_every_n_steps == 0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the gradient."""
        super().on_before_optimizer_step(optimizer)
        if self._logs:
            gradients = [value.grad for value in self.model.parameters() if value.grad is not None]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def on_validation_epoch_start(self) -> None:
        """Look at the slots anew."""
        self._states: list[State] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out loss, and scores where masks are known."""
        found = self._judge("val", batch)
        if batch_idx < 4:
            self._states.append(state_of(found))

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and name signs of collapse."""
        super().on_validation_epoch_end()
        self._log_scores("val")
        if self._states and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            state = State(*(torch.stack(values).mean() for values in zip(*self._states, strict=True)))
            for sign in signs_of_collapse(state):
                if self.trainer.is_global_zero:
                    log.warning("After %s steps: %s", self.global_step, sign)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Test loss and scores."""
        self._judge("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Int[Tensor, "B *T H W"]:
        """The slot of each pixel, by the decoder's masks."""
        images, truth = batch[0], batch[1] if len(batch) > 1 else None
        found = find(self.model, images, truth)  # pyright: ignore[reportArgumentType]
        return pixel_masks(found, images.shape[-2:])[0].argmax(-3)

    def _judge(self, part: str, batch: Batch) -> ObjectDiscoveryOutput:
        images, truth = batch
        found = find(self.model, images, truth)  # pyright: ignore[reportArgumentType]
        known = (truth != IGNORED).flatten(1).any(1)
        # Padding of the last batch has no label; images without masks have none either, and count.
        counts = known if known.any() else torch.ones_like(known)
        error = (found.reconstruction - found.target).float().square().flatten(1).mean(1)
        if self.weights["similarity"] and found.slots.ndim == 4 and found.slots.shape[1] > 1:
            one_by_one = [self._similarity(_sample(found, index)) for index in range(len(error))]
            error = self.weights["reconstruction"] * error + self.weights["similarity"] * torch.stack(one_by_one)
        loss: Any = self.losses[part]
        loss.update(error, weight=counts.to(error.dtype))
        self.log(f"{part}/loss", loss, on_step=False, on_epoch=True)
        if known.any():
            for masks, maps in zip(MASKS, pixel_masks(found, truth.shape[-2:]), strict=True):
                for name in _METRICS:
                    score: Any = self.scores[f"{part}_{masks}_{name}"]
                    score.update(maps.movedim(-3, 1), truth)
        return found

    def _log_scores(self, part: str) -> None:
        for masks in MASKS:
            for name in _METRICS:
                metric: Any = self.scores[f"{part}_{masks}_{name}"]
                if metric.update_called:
                    prefix = "" if masks == "decoder" else "attention_"
                    self.log(f"{part}/{prefix}{name}", metric.compute(), prog_bar=name == "fg_ari")
                    metric.reset()


_METRICS = {"fg_ari": FGARI, "mbo": MBO}


def _without_masks(model: ObjectDiscovery) -> InvalidArgument:
    return InvalidArgument(
        "data",
        expected=f"images with masks: the model's slots begin at the {model.hints} of true objects",
        got="images without masks",
        hint="Or build the model with initial_slots='gaussian'.",
    )


def _sample(found: ObjectDiscoveryOutput, index: int) -> ObjectDiscoveryOutput:
    return ObjectDiscoveryOutput(*(None if part is None else part[index : index + 1] for part in found))  # pyright: ignore[reportArgumentType]


def find(
    model: ObjectDiscovery,
    images: Tensor,
    truth: Tensor | None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ObjectDiscoveryOutput:
    """What a model finds; one whose slots begin at hints gets them from the true objects of the first frame.

    Raises:
        InvalidArgument: hints are needed, and there are no masks to make them of.
    """
    if getattr(model, "hints", None) is None:
        return model(images, generator=generator, **options)
    first = truth[:, 0] if truth is not None and truth.ndim == 4 else truth
    if first is None or first.ndim != 3 or (first == IGNORED).all():
        raise _without_masks(model)
    number = model.slot_attention.initial_slots.num_slots
    hints = object_hints(first, number, kind=str(model.hints))  # pyright: ignore[reportArgumentType]
    return model(images, generator=generator, hints=hints, **options)


class State(NamedTuple):
    """How slots divide a batch among themselves.

    Args:
        slots_used: slots of a sample that have the greatest share of at least 1 % of the cells, on average.
        entropy: of the attention of a token, over that of even shares: 0 where every token has made up its mind.
        similarity: mean cosine of two slots of a sample, each less the mean slot of the batch.
    """

    slots_used: Tensor
    entropy: Tensor
    similarity: Tensor


@torch.no_grad()
def state_of(found: ObjectDiscoveryOutput) -> State:
    """How the slots divide these images."""
    masks, attention = (at_least_float32(maps).flatten(0, -4) for maps in (found.masks, found.attention))
    number = masks.shape[1]
    owned = F.one_hot(masks.argmax(1), number).flatten(1, 2).float().mean(1)
    entropy = torch.special.entr(attention).sum(1).mean() / math.log(max(number, 2))
    slots = at_least_float32(found.slots).flatten(0, -3)
    slots = F.normalize(slots - slots.mean((0, 1)), dim=-1)
    others = slots @ slots.mT - torch.eye(number, device=slots.device)
    similarity = others.sum((1, 2)).mean() / max(1, number * (number - 1))
    return State((owned >= 0.01).sum(1).float().mean(), entropy, similarity)


def signs_of_collapse(state: State) -> list[str]:
    """What is wrong with the slots, in words, with what to try; empty where nothing is."""
    signs = []
    if state.slots_used < 1.5:
        signs.append(
            "one slot takes everything. Try a smaller learning rate or a longer warmup, weaker positions "
            "(position_scale), or a decoder that is too small to rebuild the image from one slot."
        )
    if state.entropy > 0.98:
        signs.append(
            "tokens are divided evenly among all slots. Early in training this passes; if it stays, try a higher "
            "learning rate, more iterations, or smaller batches for more steps."
        )
    if state.similarity > 0.95:
        signs.append(
            "all slots are alike. Try initial_slots='learned', fewer slots, or a smaller learning rate with clipped "
            "gradients."
        )
    return signs


def pixel_masks(
    found: ObjectDiscoveryOutput, size: Sequence[int]
) -> tuple[Float[Tensor, "B *T K H W"], Float[Tensor, "B *T K H W"]]:
    """Masks of decoder and attention, resized bilinearly to the size of the truth."""
    resized = []
    for maps in (found.masks, found.attention):
        flat = at_least_float32(maps).flatten(0, -4)
        flat = F.interpolate(flat, tuple(size), mode="bilinear", align_corners=False)
        resized.append(flat.view(*maps.shape[:-2], *size))
    return resized[0], resized[1]
