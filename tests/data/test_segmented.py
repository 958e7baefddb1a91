import pytest
import torch

from narrows.data import IGNORED, Position, picture
from narrows.data.digit_canvas import source_digits
from narrows.data.segmented import CLASSES, SegmentedDigits, load_segmented
from narrows.errors import InvalidArgument


def test_a_scene_does_not_depend_on_its_batch():
    scenes = SegmentedDigits(seed=3)
    together, alone = scenes.render(range(40), epoch=2), scenes.render([31, 7], epoch=2)
    for many, few in zip(together, alone, strict=True):
        assert torch.equal(many[[31, 7]], few)


def test_training_scenes_change_with_epoch_seed_and_index_and_held_out_scenes_never():
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


def test_no_handwritten_digit_is_in_both_splits():
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
def test_errors_say_what_is_expected(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
