"""Scenes of coloured shapes: a vision encoder that learned what cells show, and how well a reader describes them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.data.documents import questions_of
from narrows.data.images import IGNORED, normalised
from narrows.data.object_scenes import COLOURS, SHAPES, ObjectScene
from narrows.data.scene_documents import CELLS, ShapeChats, cells_of, described
from narrows.demo.cache import kept
from narrows.files import replacing_folder
from narrows.hub.readers import Reader, open_vision_encoder
from narrows.models import create_model
from narrows.models.vit import TransformerClassifier
from narrows.screen import Bar, track
from narrows.training.task import parameter_groups, warmup_schedule

FOLDER = Path("runs") / "flamingo_shapes"
STEPS, BATCH = 1200, 64
SIZES = {"dim": 96, "depth": 4, "heads": 4, "mlp_dim": 192}
_ANSWERS = 1 + len(SHAPES) + len(COLOURS) + CELLS


def shapes_vision_encoder(folder: Path = FOLDER, *, steps: int = STEPS) -> Path:
    """The folder of a vision transformer of shape scenes, trained from scratch unless it is there.

    Its head says of each token where it stands, and of the mean over the tokens of a cell whether something is there,
    its shape and colour. A reader of tokens needs the place as much as what stands there.
    """
    saved = folder / "vision_encoder"

    def make() -> None:
        torch.manual_seed(0)
        model: Any = create_model("vit_mini", num_classes=_ANSWERS, **SIZES)
        scenes = ShapeChats("train", length=steps * BATCH).scenes
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=2e-3, betas=(0.9, 0.98))
        schedule = warmup_schedule(optimizer, warmup_steps=max(1, steps // 10), total_steps=steps)
        with Bar("vision encoder, on tokens", steps) as bar:
            for step in range(steps):
                shown = scenes.render(range(step * BATCH, (step + 1) * BATCH))
                loss = token_loss(token_logits(model, normalised(shown.images)), shown)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.tail(f"loss {loss.item():.2f}")
                bar.advance()
        with replacing_folder(saved) as unfinished:
            model.eval().save_pretrained(unfinished)

    kept(saved, make, lambda: open_vision_encoder(saved))
    return saved


def token_logits(model: TransformerClassifier, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w answers"]:
    """What the head says of each token."""
    tokens = model.forward_tokens(images)
    return model.forward_head(tokens.flatten(0, 1)).unflatten(0, (len(images), *model.token_grid(images)))


def token_loss(logits: Float[Tensor, "B h w answers"], scenes: ObjectScene) -> Tensor:
    """Cross-entropies of each token's cell, of whether a cell is taken, and of shape and colour where it is."""
    what, where = logits.split((_ANSWERS - CELLS, CELLS), -1)
    side = math.isqrt(CELLS)
    rows, columns = (torch.arange(count) * side // count for count in logits.shape[1:3])
    places = (rows[:, None] * side + columns).expand(logits.shape[:3])
    cells = F.adaptive_avg_pool2d(what.movedim(-1, 1), side).flatten(2).transpose(1, 2)
    there, shapes, colours = cells.split((1, len(SHAPES), len(COLOURS)), -1)
    counts = scenes.shapes != IGNORED
    batch, taken = torch.arange(len(logits))[:, None].expand_as(counts)[counts], cells_of(scenes)[counts]
    full = torch.zeros(len(logits), CELLS)
    full[batch, taken] = 1.0
    return (
        F.cross_entropy(where.flatten(0, 2), places.flatten())
        + F.binary_cross_entropy_with_logits(there[..., 0], full)
        + F.cross_entropy(shapes[batch, taken], scenes.shapes[counts])
        + F.cross_entropy(colours[batch, taken], scenes.colours[counts])
    )


@dataclass(frozen=True)
class Descriptions:
    """How held-out scenes were described.

    Args:
        scenes: how many.
        objects: share of their objects that were named with the right place, colour and shape together.
        exact: share of the scenes whose description is right, word for word.
        alone: share of the objects that the language model names without images.
    """

    scenes: int
    objects: float
    exact: float
    alone: float

    def __str__(self) -> str:
        return (
            f"{self.scenes} held-out scenes described. Objects right in place, colour and shape together: "
            f"{self.objects:.1%}; whole descriptions: {self.exact:.1%}. "
            f"Objects named by the same language model without images: {self.alone:.1%}."
        )


def examine_descriptions(reader: Reader, chats: ShapeChats, *, batch_size: int = 64) -> Descriptions:
    """Let every scene of `chats` be described."""
    asked = [question for document in chats.documents(range(len(chats))) for question in questions_of(document)]
    truth = [answer for _, answer in asked]

    def said(label: str, *, blind: bool) -> list[str]:
        starts = track(range(0, len(asked), batch_size), label, unit="batches")
        batches = ([prompt for prompt, _ in asked[start : start + batch_size]] for start in starts)
        return [one for batch in batches for one in reader.generate(batch, max_new_tokens=40, blind=blind)]

    def named(given: list[str]) -> float:
        right = sum(len(set(described(one)) & set(described(true))) for one, true in zip(given, truth, strict=True))
        return right / max(1, sum(len(described(true)) for true in truth))

    seen = said("describing", blind=False)
    return Descriptions(
        scenes=len(truth),
        objects=named(seen),
        exact=sum(map(str.__eq__, seen, truth)) / max(1, len(truth)),
        alone=named(said("without images", blind=True)),
    )
