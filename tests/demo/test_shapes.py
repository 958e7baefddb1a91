from collections.abc import Sequence
from typing import Any

import pytest
import torch

from narrows.data.documents import Document, questions_of
from narrows.data.scene_documents import CELLS, ShapeChats
from narrows.demo.shapes import examine_descriptions, shapes_vision_encoder, token_loss
from narrows.hub.readers import Reader, open_vision_encoder

CHATS = ShapeChats("held_out", length=12)


class Oracle(Reader):
    """Says what is there, with the first object's colour wrong in every scene if it is to err."""

    def __init__(self, *, errs: bool) -> None:
        told = [question for document in CHATS.documents(range(12)) for question in questions_of(document)]
        self.__dict__.update(errs=errs, told={one.images.numpy().tobytes(): answer for one, answer in told})

    def generate(self, prompts: Sequence[Document], *, blind: bool = False, **_: Any) -> list[str]:
        if blind:
            return ["It is an image."] * len(prompts)
        said = [self.told[one.images.numpy().tobytes()] for one in prompts]
        return [one.replace(one.split()[5], "grey", 1) for one in said] if self.errs else said


def test_objects_count_where_place_colour_and_shape_are_right_together():
    found = examine_descriptions(Oracle(errs=False), CHATS)
    assert (found.scenes, found.objects, found.exact, found.alone) == (12, 1, 1, 0)
    erring = examine_descriptions(Oracle(errs=True), CHATS)
    objects = sum(len(answer.split(",")) for answer in Oracle(errs=False).told.values())
    assert erring.objects == pytest.approx(1 - 12 / objects)
    assert erring.exact == 0
    assert f"shape together: {1 - 12 / objects:.1%}" in str(erring)


def test_each_token_is_judged_by_where_it_stands_and_what_its_cell_shows():
    scenes = CHATS.scenes.render(range(12))
    tokens = torch.zeros(12, 6, 6, 1 + 5 + 8 + CELLS)
    for y in range(6):
        for x in range(6):
            tokens[:, y, x, 14 + y // 2 * 3 + x // 2] = 1
    tokens[..., 0] = -1
    for row, (centres, shapes, colours) in enumerate(zip(scenes.centres, scenes.shapes, scenes.colours, strict=True)):
        for (x, y), shape, colour in zip((centres * 3).long().tolist(), shapes, colours, strict=True):
            if shape >= 0:
                cell = tokens[row, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                cell[..., 0] = cell[..., 1 + shape] = cell[..., 6 + colour] = 1
    assert token_loss(tokens * 20, scenes) < 1e-3
    elsewhere, other = tokens.clone(), tokens.roll(1, 0)
    elsewhere[..., 14:] = tokens[..., 14:].roll(1, 2)
    other[..., 14:] = tokens[..., 14:]
    assert token_loss(elsewhere * 20, scenes) > 5
    assert token_loss(other * 20, scenes) > 5


def test_the_encoder_is_trained_once_and_opens(tmp_path):
    first = shapes_vision_encoder(tmp_path, steps=2)
    weights = (first / "model.safetensors").read_bytes()
    assert shapes_vision_encoder(tmp_path, steps=9) == first
    assert (first / "model.safetensors").read_bytes() == weights
    assert open_vision_encoder(first)(torch.rand(2, 3, 32, 32)).shape == (2, 64, 96)
