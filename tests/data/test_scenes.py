import pytest
import torch
from torch.nn import functional as F

from narrows.data import IGNORED, DigitScenes, Position, picture
from narrows.data.scenes import CLASSES, SegmentedDigits, load_segmented, source_digits
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


def test_a_segmented_scene_does_not_depend_on_its_batch():
    scenes = SegmentedDigits(seed=3)
    together, alone = scenes.render(range(40), epoch=2), scenes.render([31, 7], epoch=2)
    for many, few in zip(together, alone, strict=True):
        assert torch.equal(many[[31, 7]], few)


def test_segmented_training_scenes_change_with_epoch_seed_and_index_and_held_out_scenes_never():
    first = SegmentedDigits(seed=0).render([0, 1]).images
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, SegmentedDigits(seed=0).render([0, 1], epoch=1).images)
    assert not torch.equal(first, SegmentedDigits(seed=1).render([0, 1]).images)
    held_out = SegmentedDigits("held_out")
    assert torch.equal(held_out.render([5]).images, held_out.render([5], epoch=9).images)


def test_classes_boxes_and_labels_tell_of_the_same_digits():
    rendered = SegmentedDigits("held_out").render(range(200))
    there = rendered.labels != IGNORED
    assert torch.equal(there.sum(1).unique(), torch.arange(1, 4))
    assert (rendered.boxes[~there] == 0).all()
    pixels = torch.arange(64) + 0.5
    left, top, right, bottom = rendered.boxes.unsqueeze(-1).unbind(2)
    inside = ((pixels > top) & (pixels < bottom))[..., None] & ((pixels > left) & (pixels < right))[..., None, :]
    digits = rendered.classes > 0
    # A turned stroke may leave the square of its digit by a little.
    assert (digits & ~inside.any(1)).sum() < 0.02 * digits.sum()
    of_its_class = (rendered.classes[:, None] == rendered.labels[..., None, None]) & inside
    assert (of_its_class.sum((2, 3))[there] >= 15).all()
    for classes, labels in zip(rendered.classes, rendered.labels, strict=True):
        assert set(classes.unique().tolist()) <= {0, *labels.tolist()}


def test_digits_keep_apart():
    boxes = SegmentedDigits(digits=(3, 3)).render(range(200)).boxes
    covered = torch.zeros(200)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        sides = boxes[:, a, 2:].minimum(boxes[:, b, 2:]) - boxes[:, a, :2].maximum(boxes[:, b, :2])
        covered += sides.clamp(min=0).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sum(1)
    # Put down without looking, three squares of 20 to 28 of 64 pixels would cover a quarter of their area twice.
    assert (covered / areas).mean() < 0.04


def test_digits_are_bright_and_clutter_is_background():
    rendered = SegmentedDigits().render(range(100))
    bright, dim = (rendered.images[:, 0].float()[mask].mean() for mask in (rendered.classes > 0, rendered.classes == 0))
    assert bright > dim + 80


def test_no_handwritten_digit_is_in_both_splits_of_segmented_scenes():
    assert len(SegmentedDigits("train").sources) + len(SegmentedDigits("held_out").sources) == 1797
    assert torch.equal(SegmentedDigits("held_out").sources, source_digits("held_out")[0])


def test_a_set_gives_images_with_classes_and_marks_what_does_not_count():
    scenes = SegmentedDigits()
    images, classes = scenes.__getitems__([Position(3), Position(4, counts=False)])
    rendered = scenes.render([3])
    assert torch.allclose(picture(images[:1]), rendered.images / 255, atol=1e-6)
    assert torch.equal(classes[:1], rendered.classes)
    assert (classes[1] == IGNORED).all()


def test_digits_are_loaded_with_a_background_class():
    data = load_segmented("digits", seed=2)
    assert data.classes == CLASSES == ("background", *"0123456789")
    assert (data.num_classes, data.image_size, data.channels) == (11, 64, 1)
    assert len(data.train) == 6000
    assert data.test is data.held_out
    assert load_segmented(image_size=96).train[0][1].shape == (96, 96)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SegmentedDigits("val"), "split: expected 'train' or 'held_out', got 'val'"),
        (lambda: SegmentedDigits(size=16), "digit_size: expected 8 <= least <= greatest <= 16"),
        (lambda: SegmentedDigits(digits=(3, 2)), "digits: expected 0 <= least <= greatest, and one at least"),
        (lambda: SegmentedDigits(digits=(0, 0)), "digits: expected 0 <= least <= greatest, and one at least"),
        (lambda: load_segmented("photos"), "data: expected 'digits', the only images here that come with the class"),
    ],
)
def test_errors_about_segmented_scenes_say_what_is_expected(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
