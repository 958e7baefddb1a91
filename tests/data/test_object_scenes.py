import hashlib

import pytest
import torch

from narrows.data import IGNORED, DigitObjects, Position, SpriteScenes, picture
from narrows.data.object_scenes import COLOURS, HUES, OBJECT_SCENES, SHAPES, load_object_scenes
from narrows.errors import InvalidArgument


@pytest.mark.parametrize("options", [{}, {"frames": 3}, {"cells": 3}, {"background": "waves"}], ids=str)
def test_a_scene_does_not_depend_on_its_batch(options):
    scenes = SpriteScenes(seed=3, **options)
    together, alone = scenes.render(range(20), epoch=2), scenes.render([11, 7], epoch=2)
    for many, few in zip(together, alone, strict=True):
        assert torch.equal(many[[11, 7]], few)


def test_training_scenes_change_with_epoch_seed_and_index_and_held_out_scenes_never():
    first = SpriteScenes(seed=0).render([0, 1]).images
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, SpriteScenes(seed=0).render([0, 1], epoch=1).images)
    assert not torch.equal(first, SpriteScenes(seed=1).render([0, 1]).images)
    held_out = SpriteScenes("held_out")
    assert torch.equal(held_out.render([5]).images, held_out.render([5], epoch=9).images)
    assert not torch.equal(held_out.render([5]).images, SpriteScenes(seed=0).render([5]).images)


def test_scenes_are_the_same_on_every_machine():
    """Masks of a hundred scenes by their hash: images may differ by a rounding between machines, masks hardly."""
    masks = SpriteScenes("held_out").render(range(4)).masks.to(torch.uint8)
    assert masks.flatten(1).count_nonzero(1).tolist() == [104, 234, 266, 186]
    assert hashlib.sha256(masks.numpy().tobytes()).hexdigest()[:12] == "ce851d59406b"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_has_the_shape_the_colour_and_the_place_it_says(shape):
    scenes = SpriteScenes(size=96, objects=(1, 1), radius=(0.3, 0.3), shapes=(shape,))
    scene = scenes.render(range(16))
    assert (scene.shapes == SHAPES.index(shape)).all()
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    areas = {"square": 1.52**2, "disc": torch.pi * 0.86**2, "triangle": 3 * 3**0.5 * 0.58**2}
    areas |= {"cross": 4 * 0.72 - 0.72**2, "ring": torch.pi * (0.96**2 - 0.44**2)}
    for image, mask, colour, (x, y) in zip(
        scene.images, scene.masks, scene.colours[:, 0], scene.centres[:, 0] * 96, strict=True
    ):
        inside = mask == 1
        assert inside.sum() == pytest.approx(areas[shape] * (0.3 * 96) ** 2, rel=0.02)
        middle = torch.stack((columns[inside].double().mean(), rows[inside].double().mean())) + 0.5
        assert (middle - torch.stack((x, y))).abs().max() < 1
        red, green, blue = (image[:, inside].double().median(1).values / 255).tolist()
        high, low = max(red, green, blue), min(red, green, blue)
        sector = {red: (green - blue) / (high - low), green: 2 + (blue - red) / (high - low)}
        hue = 60 * sector.get(high, 4 + (red - green) / (high - low))
        away = (hue - HUES[COLOURS[colour]] + 180) % 360 - 180
        assert abs(away) < 12


def test_objects_of_a_scene_have_different_colours_and_as_many_as_asked_for():
    scene = SpriteScenes(objects=(2, 5)).render(range(200))
    counts = (scene.colours != IGNORED).sum(1)
    assert counts.unique().tolist() == [2, 3, 4, 5]
    assert torch.equal(scene.shapes == IGNORED, scene.colours == IGNORED)
    for colours, count in zip(scene.colours, counts, strict=True):
        assert colours[:count].unique().numel() == count
    assert scene.masks.amax((1, 2)).max() == 5


def test_objects_keep_apart_and_on_the_canvas_as_asked():
    scenes = SpriteScenes(objects=(3, 3), radius=(0.1, 0.1), apart=1.2)
    centres = scenes.render(range(200)).centres
    distance = torch.cdist(centres, centres)[:, [0, 0, 1], [1, 2, 2]]
    assert (distance >= 1.2 * 0.2 - 1e-6).double().mean() > 0.99
    assert (centres >= 0.1).all()
    assert (centres <= 0.9).all()


def test_a_later_object_covers_an_earlier_one():
    scene = SpriteScenes(objects=(2, 2), radius=(0.3, 0.3), apart=0.0, shapes=("disc",)).render(range(50))
    at_centre = (scene.centres[:, 1] * 32).long()
    assert (scene.masks[torch.arange(50), at_centre[:, 1], at_centre[:, 0]] == 2).all()
    assert ((scene.masks == 1).flatten(1).sum(1) < (scene.masks == 2).flatten(1).sum(1) * 0.9).any()


def test_on_a_grid_every_object_stands_in_a_cell_of_its_own():
    scene = SpriteScenes(objects=(2, 3), cells=3).render(range(100))
    cells = (scene.centres * 3).floor()
    assert torch.allclose(scene.centres, (cells + 0.5) / 3)
    numbers = (cells[..., 0] + 3 * cells[..., 1]).long()
    assert all(len(set(row)) == 3 for row in numbers.tolist())
    assert numbers.unique().numel() == 9


def test_moving_objects_enter_leave_cross_and_keep_their_numbers():
    scene = SpriteScenes(frames=8).render(range(100))
    there = torch.stack([(scene.masks == number).flatten(2).any(2) for number in range(1, 5)], 2)
    assert (~there[:, 0] & there[:, -1]).any(), "none enters"
    assert (there[:, 0] & ~there[:, -1]).any(), "none leaves"
    gap = (scene.centres[:, :, 0] - scene.centres[:, :, 1]).norm(dim=-1)
    assert ((gap[:, 1:-1].amin(1) < 0.15) & (gap[:, 0] > 0.25) & (gap[:, -1] > 0.25)).any(), "none pass each other"
    images = scene.images
    for clip in range(20):  # the commonest colour of its pixels stays the same
        inside = [scene.masks[clip, frame] == 1 for frame in range(8)]
        seen = [images[clip, frame][:, mask].mode(1).values for frame, mask in enumerate(inside) if mask.sum() > 40]
        assert all(torch.equal(colour, seen[0]) for colour in seen[1:])


def test_digits_on_clutter_are_numbered_one_by_one():
    scenes = DigitObjects("held_out", digits=(2, 3))
    images, masks = scenes.batch(range(30))
    assert images.shape == (30, 3, 64, 64)
    rendered = scenes.render(range(30))
    assert torch.equal(masks > 0, rendered.classes > 0)
    for mask, classes, labels in zip(masks, rendered.classes, rendered.labels, strict=True):
        for number in mask.unique()[1:].tolist():
            assert classes[mask == number].unique().tolist() == [labels[number - 1]]


@pytest.mark.parametrize("name", OBJECT_SCENES)
def test_scenes_load_by_name(name):
    if "tabletop" in name:
        pytest.importorskip("pybullet")
    data = load_object_scenes(name, length=64)
    images, masks = data.train[Position(3, epoch=1)]
    assert images.shape[-3:] == (3, data.image_size, data.image_size)
    assert masks.shape == (*images.shape[:-3], *images.shape[-2:])
    assert (images.ndim == 4) == name.startswith("moving")
    assert picture(images).std() > 0.02
    assert len(data.train) == 64
    padding = data.train.__getitems__([Position(0, counts=False)])[1]
    assert (padding == IGNORED).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpriteScenes("val"), "split: expected"),
        (lambda: SpriteScenes(size=8), "size: expected at least 16 pixels"),
        (lambda: SpriteScenes(objects=(3, 2)), "objects: expected 0 <= least <= greatest"),
        (lambda: SpriteScenes(objects=(1, 9)), "objects: expected 0 <= least <= greatest, 1 to 8"),
        (lambda: SpriteScenes(radius=(0.0, 0.2)), "radius: expected 0 < least"),
        (lambda: SpriteScenes(shapes=("heart",)), "shapes: expected"),
        (lambda: SpriteScenes(shapes=()), "shapes: expected one at least"),
        (lambda: SpriteScenes(background="sky"), "background: expected"),
        (lambda: SpriteScenes(cells=1), "cells: expected a grid with a cell for each of 4 objects"),
        (lambda: SpriteScenes(cells=3, frames=2), "cells: expected"),
        (lambda: load_object_scenes("sprite"), "data: expected"),
        (lambda: load_object_scenes("sprite_grid", frames=4), "frames: expected None for 'sprite_grid'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()
