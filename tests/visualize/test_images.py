"""Whatever people hold a picture in becomes the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from narrows.errors import InvalidArgument, InvalidType
from narrows.visualize.images import to_image

BYTES = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(BYTES).permute(2, 0, 1).double() / 255


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(BYTES, id="array of bytes"),
        pytest.param(BYTES / 255, id="array of doubles"),
        pytest.param(BYTES[::-1].copy()[::-1] / np.float32(255), id="array with negative strides made positive"),
        pytest.param(torch.from_numpy(BYTES).permute(2, 0, 1), id="tensor of bytes"),
        pytest.param((torch.from_numpy(BYTES).permute(2, 0, 1) / 255).requires_grad_(), id="tensor with gradient"),
        pytest.param(Image.fromarray(BYTES), id="PIL"),
    ],
)
def test_every_kind_of_picture_gives_the_same_pixels(image: object) -> None:
    torch.testing.assert_close(to_image(image).double(), EXPECTED, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(BYTES[..., 0], id="array [H, W]"),
        pytest.param(BYTES[..., :1], id="array [H, W, 1]"),
        pytest.param(torch.from_numpy(BYTES[..., 0])[None], id="tensor [1, H, W]"),
        pytest.param(Image.fromarray(BYTES[..., 0]), id="PIL grey"),
    ],
)
def test_grey_pictures_have_the_same_value_in_each_colour(image: object) -> None:
    torch.testing.assert_close(to_image(image).double(), EXPECTED[:1].expand(3, -1, -1), atol=1e-6, rtol=0)


def test_a_transparent_pil_picture_loses_its_transparency_only() -> None:
    opaque = Image.fromarray(np.concatenate([BYTES, np.full((5, 7, 1), 255, np.uint8)], -1))
    torch.testing.assert_close(to_image(opaque).double(), EXPECTED, atol=1e-6, rtol=0)


def test_normalised_pixels_are_refused_with_the_way_back() -> None:
    with pytest.raises(
        InvalidArgument, match=r"image: expected values in 0\.\.1, got values in -2\.\.1\. Undo the norm"
    ):
        to_image(torch.tensor([[[-2.0, 1.0]]]))


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"image: expected values in 0\.\.1, got values in nan"):
        to_image(torch.full((3, 2, 2), float("nan")))


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"picture: expected a tensor \[3\|1, H, W\].*got shape \(4, 5, 6\)"):
        to_image(torch.zeros(4, 5, 6), name="picture")


@pytest.mark.parametrize(
    ("image", "message"), [("cat.png", "got str"), (torch.zeros(3, 4, 4, dtype=torch.long), r"dtype torch\.int64")]
)
def test_a_wrong_kind_is_named(image: object, message: str) -> None:
    with pytest.raises(InvalidType, match=message):
        to_image(image)
