"""Segmentations side by side."""

import numpy as np
import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.visualize import segmentations
from narrows.visualize.canvas import carrier_colour, to_rgb

CLASSES = ("background", "left", "right")


def _halves() -> torch.Tensor:
    """Two maps: left above background, background above right."""
    maps = torch.zeros(2, 8, 8, dtype=torch.long)
    maps[0, :4], maps[1, 4:] = 1, 2
    return maps


def _panels(figure) -> list[list[np.ndarray]]:
    """The pictures of a figure of two columns, row by row."""
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    return [pictures[start : start + 2] for start in range(0, len(pictures), 2)]


def _hue(picture: np.ndarray) -> np.ndarray:
    """The mean colour less its grey part."""
    colour = picture.reshape(-1, 3).mean(0)
    return colour - colour.min()


def test_every_pixel_has_the_colour_of_its_class_and_the_background_none() -> None:
    figure = segmentations(torch.rand(2, 1, 8, 8), {"truth": _halves()}, CLASSES)
    images, (first, second) = _panels(figure)
    height = first.shape[0] // 2
    assert _hue(images[0]).max() < 1e-6
    for rank, part, other in (
        (0, first[: height - 8], first[height + 8 :]),
        (1, second[height + 8 :], second[: height - 8]),
    ):
        expected = to_rgb(carrier_colour(rank)).numpy()
        assert np.corrcoef(_hue(part), expected)[0, 1] > 0.99
        assert _hue(other).max() < 1e-6


def test_rows_and_classes_are_named() -> None:
    figure = segmentations([torch.rand(3, 8, 8)] * 2, {"truth": _halves(), "model": _halves()}, CLASSES)
    assert len(_panels(figure)) == 3
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["image", "truth", "model"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["left", "right"]


def test_a_class_number_may_stand_for_the_background_other_than_0() -> None:
    figure = segmentations(torch.rand(2, 1, 8, 8), {"truth": _halves()}, CLASSES, background=1)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["background", "right"]


def test_errors_say_what_is_expected() -> None:
    with pytest.raises(InvalidArgument, match="images: expected at least one image, got none"):
        segmentations([], {}, CLASSES)
    with pytest.raises(InvalidArgument, match=r"rows\['truth'\]: expected a map for each of 1 images, got 2"):
        segmentations(torch.rand(1, 1, 8, 8), {"truth": _halves()}, CLASSES)
