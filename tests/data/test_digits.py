import pytest
import torch
from torch.nn import functional as F

from narrows.data import DigitScenes, Position, picture
from narrows.data.digit_canvas import source_digits
from narrows.errors import InvalidArgument


def test_a_scene_does_not_depend_on_its_batch():
    scenes = DigitScenes(seed=3)
    together, alone = scenes.render(range(40), epoch=2), scenes.render([31, 7], epoch=2)
    for many, few in zip(together, alone, strict=True):
        assert torch.equal(many[[31, 7]], few)


def test_training_scenes_change_with_epoch_seed_and_index_and_held_out_scenes_never():
    first = DigitScenes(seed=0).render([0, 1]).images
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, DigitScenes(seed=0).render([0, 1], epoch=1).images)
    assert not torch.equal(first, DigitScenes(seed=1).render([0, 1]).images)
    held_out = DigitScenes("held_out")
    assert torch.equal(held_out.render([5]).images, held_out.render([5], epoch=9).images)


def test_no_handwritten_digit_is_in_both_splits():
    (train, train_labels), (held_out, held_out_labels) = source_digits("train"), source_digits("held_out")
    assert len(train) + len(held_out) == 1797
    assert torch.cdist(train.flatten(1), held_out.flatten(1)).min() > 0.1
    for digit in range(10):
        share = (held_out_labels == digit).sum() / ((held_out_labels == digit).sum() + (train_labels == digit).sum())
        assert 0.19 < share < 0.21


def test_held_out_scenes_show_every_held_out_digit_equally_often():
    scenes = DigitScenes("held_out")
    labels = scenes.render(range(len(scenes))).labels
    assert torch.equal(labels.bincount(), 4 * source_digits("held_out")[1].bincount())


def test_the_digit_of_the_label_is_in_the_box():
    scenes = DigitScenes("held_out", size=64)
    sources, labels = source_digits("held_out")
    templates = F.normalize((F.interpolate(sources[:, None, 4:36, 4:36], (16, 16)) > 0.4).float().flatten(1) - 0.3)
    rendered = scenes.render(range(100))
    right = 0
    for mask, box, label in zip(rendered.masks, rendered.boxes.round().int().tolist(), rendered.labels, strict=True):
        left, top, right_edge, bottom = box
        cut = F.interpolate(mask[None, None, top:bottom, left:right_edge].float(), (16, 16), mode="area")
        right += int(labels[(F.normalize(cut.flatten(1) - 0.3) @ templates.T).argmax()] == label)
    assert right >= 95
    inside = torch.zeros_like(rendered.masks)
    for scene, (left, top, right_edge, bottom) in enumerate(rendered.boxes.tolist()):
        inside[scene, max(0, int(top) - 8) : int(bottom) + 9, max(0, int(left) - 8) : int(right_edge) + 9] = True
    assert (rendered.masks & ~inside).sum() == 0


@pytest.mark.parametrize(("size", "digit_size"), [(32, None), (96, (20.0, 30.0)), (224, None)])
def test_digits_have_the_size_asked_for_and_stay_on_the_canvas(size, digit_size):
    boxes = DigitScenes(size=size, digit_size=digit_size).render(range(200)).boxes
    least, greatest = digit_size or (size / 2, size * 5 / 8)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= least - 1e-3).all()
    assert (sides <= greatest + 1e-3).all()
    assert sides.max() > least + 0.9 * (greatest - least)
    assert boxes.min() >= -1e-3
    assert boxes.max() <= size + 1e-3


def test_normalised_images_are_the_rendered_pixels_with_mean_0_and_spread_1():
    scenes = DigitScenes()
    images, labels = scenes.batch(range(500), epoch=1)
    rendered = scenes.render(range(500), epoch=1)
    assert torch.allclose(picture(images), rendered.images / 255, atol=1e-6)
    assert torch.equal(labels, rendered.labels)
    assert abs(images.mean()) < 0.1
    assert 0.8 < images.std() < 1.2


def test_positions_and_indices_fetch_the_same_scene():
    scenes = DigitScenes()
    assert torch.equal(scenes[3][0], scenes[Position(3)][0])
    assert not torch.equal(scenes[3][0], scenes[Position(3, epoch=1)][0])
    assert scenes[Position(3, counts=False)][1] == -100
    assert len(scenes) == 6000
    assert scenes.name(3) == "scene 3"
    with pytest.raises(IndexError):
        scenes[6000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split: expected 'train' or 'held_out', got 'val'"),
        ({"size": 8}, "size: expected at least 16 pixels, so that digits can be read, got 8"),
        ({"digit_size": (20.0, 10.0)}, "digit_size: expected 8 <= least <= greatest <= 32"),
        ({"digit_size": (20.0, 40.0)}, "digit_size: expected 8 <= least <= greatest <= 32"),
        ({"digit_size": (2.0, 10.0)}, "digit_size: expected 8 <= least <= greatest <= 32"),
        ({"length": 0}, "length: expected a positive integer, got 0"),
    ],
)
def test_errors_say_what_is_expected(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        DigitScenes(**arguments)
