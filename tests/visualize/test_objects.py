import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.visualize import found_objects
from narrows.visualize.canvas import carrier_colour, to_rgb
from narrows.visualize.objects import _of_truth


def test_columns_are_image_truth_masks_reconstruction_and_slots() -> None:
    images, masks = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16).softmax(1)
    truth = torch.zeros(2, 16, 16, dtype=torch.long)
    truth[:, 4:8] = 1
    figure = found_objects(images, masks, truth=truth, reconstruction=images, parts=torch.rand(2, 3, 3, 16, 16))
    names = [axis.get_title() for axis in figure.axes[:7]]
    assert names == ["image", "truth", "masks", "rebuilt", "slot 1", "slot 2", "slot 3"]
    assert len(figure.axes) == 14
    assert [axis.get_title() for axis in found_objects(images, masks).axes[:2]] == ["image", "masks"]


def test_what_a_slot_puts_there_fades_to_white_outside_its_mask() -> None:
    masks = torch.zeros(1, 2, 8, 8)
    masks[:, 0, :4], masks[:, 1, 4:] = 1, 1
    figure = found_objects(torch.zeros(1, 3, 8, 8), masks, parts=torch.zeros(1, 2, 3, 8, 8))
    shown = torch.from_numpy(figure.axes[2].images[0].get_array())
    half = len(shown) // 2
    assert (shown[:half] == 0).all()
    assert (shown[half:] == 1).all()


def test_a_true_object_has_the_colour_of_the_slot_that_holds_most_of_it() -> None:
    truth, owner = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
    truth[0], truth[3, :2] = 1, 2
    owner[0], owner[3, :2] = 2, 2
    colours = {1: carrier_colour(0), 2: carrier_colour(1)}
    found = _of_truth(truth[None], owner[None], colours)
    assert found[1] == carrier_colour(1)
    assert found[2] != found[1]
    assert to_rgb(found[2]).shape == (3,)


@pytest.mark.parametrize("clip", [False, True])
def test_in_the_frames_of_a_clip_slots_and_objects_keep_their_colours(clip: bool) -> None:
    """Slot 1 is smaller than slot 2 in the first frame and larger in the second."""
    masks, truth = torch.zeros(2, 3, 12, 12), torch.zeros(2, 12, 12, dtype=torch.long)
    masks[:, 0] = 0.5
    for frame, (one, two) in enumerate(((1, 3), (3, 1))):
        masks[frame, 1, :one], masks[frame, 2, -two:] = 1, 1
        truth[frame, :one], truth[frame, -two:] = 1, 2
    axes = found_objects(torch.zeros(2, 3, 12, 12), masks, truth=truth, clip=clip).axes
    for column in (1, 2):
        first, second = (axes[row * 3 + column].images[0].get_array() for row in range(2))
        assert bool((first[0, 0] == second[0, 0]).all()) == clip
        assert (first[0, 0] != first[-1, -1]).any()


@pytest.mark.compiled  # shape checks of the test run would answer first
def test_masks_of_other_images_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="masks: expected"):
        found_objects(torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8))
